"""Metrics and slices in words, for the page and for Markdown: the raw keys stand in report.json."""

from __future__ import annotations

METRICS: dict[str, str] = {
    "f1": "F1",
    "exact": "Exact match",
    "total": "Questions",
    "HasAns_f1": "F1, answerable questions",
    "HasAns_exact": "Exact match, answerable questions",
    "HasAns_total": "Answerable questions",
    "NoAns_f1": "F1, unanswerable questions",
    "NoAns_exact": "Exact match, unanswerable questions",
    "NoAns_total": "Unanswerable questions",
    "best_f1": "Best F1 of the official search over null thresholds",
    "best_f1_thresh": "Null threshold of that F1",
    "best_exact": "Best exact match of the official search over null thresholds",
    "best_exact_thresh": "Null threshold of that exact match",
    "tuned_f1": "Best F1 of one null threshold",
    "tuned_f1_thresh": "Null threshold of that F1, which auto takes",
    "tuned_exact": "Best exact match of one null threshold",
    "tuned_exact_thresh": "Null threshold of that exact match",
    "crossfit_f1": "F1 to expect on new data with a tuned null threshold",
    "crossfit_exact": "Exact match to expect on new data with a tuned null threshold",
    "untuned_f1": "F1 at the null threshold 0",
    "untuned_exact": "Exact match at the null threshold 0",
    "null_score_diff_threshold": "Null threshold: above these null odds the answer is empty",
    "loss": "Mean loss over the windows",
    "macro_f1": "F1, mean of the files",
    "macro_exact": "Exact match, mean of the files",
    "not_scored": "Questions without known gold answers, not scored",
    "missing": "Questions without a prediction",
    "extra": "Predictions without a question",
}
"""What a metric is, by its key in metrics.json."""

SLICES: dict[str, str] = {
    "file": "File",
    "question_word": "Question word",
    "context_words": "Words in the context",
    "windows": "Windows that the context was cut into",
    "answer_words": "Words in the shortest gold answer",
    "answerable": "Answerable",
}
"""What a slice is, by its key in report.json."""


def percent(part: float) -> str:
    """A part of 1 as a whole percentage."""
    return f"{100 * part:.0f}%"


def interval(ends: list[float] | None) -> str:
    """The ends of an interval in words; "" without one."""
    return f"{ends[0]:.1f} to {ends[1]:.1f}" if ends else ""
