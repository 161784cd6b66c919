"""What an evaluation says beyond its scores: calibration, thresholds, scores by kind of question, worst mistakes."""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.decoding.predictions import Prediction
from qa_deepspeed.qa.metrics.normalization import normalized_tokens
from qa_deepspeed.qa.metrics.records import QuestionRecords
from qa_deepspeed.qa.metrics.significance import interval_of_sums
from qa_deepspeed.qa.metrics.thresholds import QUESTIONS_AT_ONCE, by_odds

CALIBRATION_BINS = 10
CURVE_POINTS = 200
MISTAKES_KEPT = 50
MOST_CLUSTERS = 4000  # of the bootstrap, whose memory grows with them
SNIPPET_CHARACTERS = 80  # of context on either side of the predicted answer
QUESTION_WORDS = ("what", "which", "who", "whom", "whose", "where", "when", "why", "how many", "how much", "how")


class Analysis:
    """Takes questions one at a time, after a `Scorer` did, and keeps a few numbers of each; `report` sums up."""

    def __init__(self, version_2_with_negative: bool, language: str = "en", folder: Path | None = None):
        """folder: on whose disk the records of many questions lie."""
        self._v2 = version_2_with_negative
        self._language = language
        self._records = QuestionRecords(np.dtype([("confidence", "f4"), ("paragraph", "i4")]), folder)
        self._paragraphs = 0
        self._context: str | None = None
        # slice -> value -> [questions, exact, f1]
        self._slices: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0, 0.0, 0.0]))
        self._mistakes: list[tuple[float, int, dict[str, Any]]] = []

    def add(self, example: Example, prediction: Prediction, windows: int, exact: int, f1: float) -> None:
        """Take in one question with what it scored; `windows` is the number of its features."""
        golds = tuple(answer.text for answer in example.answers)
        confidence = next((share for text, share, *_ in prediction.nbest if text == prediction.text), 0.0)
        if example.context != self._context:  # the questions of a paragraph come one after another
            self._paragraphs += 1
            self._context = example.context
        self._records.append((confidence, self._paragraphs - 1))
        for name, value in self._kinds(example, golds, windows).items():
            cell = self._slices[name][value]
            cell[0] += 1
            cell[1] += exact
            cell[2] += f1
        if not exact:
            self._remember_mistake(example, prediction, golds, confidence, f1)

    def _kinds(self, example: Example, golds: tuple[str, ...], windows: int) -> dict[str, str]:
        kinds = {
            "question_word": question_word(example.question),
            "context_words": _bucket(len(example.context.split()), (50, 100, 150, 200, 300)),
            "windows": _bucket(windows, (0, 1, 2, 3)),
        }
        if golds:
            words = min(len(normalized_tokens(gold, self._language)) for gold in golds)
            kinds["answer_words"] = _bucket(words, (1, 2, 3, 5, 10))
        if self._v2:
            kinds["answerable"] = "yes" if golds else "no"
        return kinds

    def _remember_mistake(
        self, example: Example, prediction: Prediction, golds: tuple[str, ...], confidence: float, f1: float
    ) -> None:
        # the running number settles ties, so that the mistake seen first stays
        key = (confidence, -len(self._records))
        if len(self._mistakes) == MISTAKES_KEPT and key < self._mistakes[0][:2]:
            return
        mistake = {
            "example_id": example.example_id,
            "question": example.question,
            "gold": list(dict.fromkeys(golds)),
            "prediction": prediction.text,
            "probability": confidence,
            "f1": f1,
            "context": _snippet(example, prediction, golds),
        }
        push = heapq.heappushpop if len(self._mistakes) == MISTAKES_KEPT else heapq.heappush
        push(self._mistakes, (*key, mistake))  # type: ignore[arg-type]

    def confidence(self) -> np.ndarray:
        """The probability of each answer given, float32 `[questions]`, perhaps mapped."""
        return self._records.columns()["confidence"]

    def report(self, scores: np.ndarray) -> dict[str, Any]:
        """JSON-able: `questions`, `intervals`, `calibration`, `slices`, `mistakes` and, with null odds,
        `precision_recall`.

        Args:
            scores: `Scorer.records` of the same questions.
        """
        records = self._records.columns()
        assert len(records) == len(scores), "scorer and analysis have seen the same questions"
        mistakes = [mistake for *_, mistake in sorted(self._mistakes, key=lambda m: m[:2], reverse=True)]
        report = {
            "questions": len(records),
            "intervals": self._intervals(scores, records["paragraph"]),
            "calibration": calibration(records["confidence"], scores["exact"]),
            "slices": {name: _shares(values) for name, values in self._slices.items()},
            "mistakes": mistakes,
        }
        if self._v2:
            has_answer, odds = scores["has_answer"], scores["odds"]
            earned = {"exact": scores["best_exact"], "f1": scores["best_f1"], "oracle": None}
            order = by_odds(odds)
            report["precision_recall"] = {
                name: precision_recall(column, has_answer, odds, order) for name, column in earned.items()
            }
        return report

    def _intervals(self, scores: np.ndarray, paragraph: np.ndarray) -> dict[str, list[float]]:
        """95% bootstrap intervals in percent; paragraphs are drawn, many of them in groups of neighbours."""
        clusters = min(self._paragraphs, MOST_CLUSTERS)
        sums = {name: np.zeros(clusters) for name in ("questions", "exact", "f1")}
        for begin in range(0, len(scores), QUESTIONS_AT_ONCE):
            part = slice(begin, begin + QUESTIONS_AT_ONCE)
            number = paragraph[part].astype(np.int64) * clusters // self._paragraphs
            sums["questions"] += np.bincount(number, minlength=clusters)
            for name in ("exact", "f1"):
                sums[name] += np.bincount(number, weights=scores[name][part], minlength=clusters)
        found = {name: interval_of_sums(sums[name], sums["questions"]) for name in ("exact", "f1")}
        return {name: [100 * interval.low, 100 * interval.high] for name, interval in found.items()}


def question_word(question: str) -> str:
    """The first question word of a question, "other" if there is none."""
    found = re.search(rf"\b({'|'.join(QUESTION_WORDS)})\b", question.lower())
    return found.group(1) if found else "other"


def calibration(confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Expected calibration error: the mean gap between confidence and accuracy over bins of equal width, weighted by
    their sizes (Guo et al. 2017, equation 5).

    Args:
        confidence: float [questions] in 0..1. correct: 0 or 1 [questions].
    """
    counts, confident, right = np.zeros((3, CALIBRATION_BINS))
    for begin in range(0, len(confidence), QUESTIONS_AT_ONCE):
        part = np.asarray(confidence[begin : begin + QUESTIONS_AT_ONCE], np.float64)
        number = np.clip(np.ceil(part * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
        counts += np.bincount(number, minlength=CALIBRATION_BINS)
        confident += np.bincount(number, part, CALIBRATION_BINS)
        right += np.bincount(number, correct[begin : begin + QUESTIONS_AT_ONCE], CALIBRATION_BINS)
    bins, error = [], 0.0
    for i in np.flatnonzero(counts).tolist():
        mean, accuracy = float(confident[i] / counts[i]), float(right[i] / counts[i])
        error += abs(mean - accuracy) * float(counts[i]) / len(confidence)
        edges = {"from": i / CALIBRATION_BINS, "to": (i + 1) / CALIBRATION_BINS}
        bins.append(edges | {"questions": int(counts[i]), "confidence": mean, "accuracy": accuracy})
    return {"expected_calibration_error": error, "bins": bins}


def precision_recall(
    score: np.ndarray | None, has_answer: np.ndarray, odds: np.ndarray, order: np.ndarray
) -> dict[str, Any]:
    """Precision and recall of the answers given while the threshold on the null odds rises, and average precision in
    percent, as the official v2.0 script has them (`make_precision_recall_eval`); at most CURVE_POINTS points are kept.

    Args:
        score: float [questions], what the best span earns; None for 1 everywhere. has_answer: bool. odds: float, the
            null odds. order: int [questions], by rising odds.
    """
    curve: dict[str, Any] = {"average_precision": 0.0, "threshold": [], "precision": [], "recall": []}
    answerable = int(has_answer.sum())
    if not answerable:
        return curve
    distinct = sum(int(ends.sum()) for _, ends in _odds_in_order(odds, order))
    shown = np.unique(np.linspace(0, distinct - 1, CURVE_POINTS).round().astype(int))
    earned = recall_before = average = 0.0
    done = passed = 0
    for questions, ends in _odds_in_order(odds, order):
        gains = has_answer[questions] * (1.0 if score is None else score[questions])
        totals = np.cumsum(np.concatenate(([earned], gains)))[1:]
        precision = (totals / np.arange(done + 1, done + len(questions) + 1))[ends]
        recall = (totals / answerable)[ends]
        average += float((precision * np.diff(recall, prepend=recall_before)).sum())
        here = shown[(shown >= passed) & (shown < passed + len(recall))] - passed
        for name, values in (("threshold", odds[questions[ends]]), ("precision", precision), ("recall", recall)):
            curve[name] += values[here].tolist()
        earned, done, passed = float(totals[-1]), done + len(questions), passed + len(recall)
        recall_before = float(recall[-1]) if len(recall) else recall_before
    return curve | {"average_precision": 100.0 * average}


def _odds_in_order(odds: np.ndarray, order: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Questions by rising odds, a chunk at a time, and whether each is the last of those with its odds."""
    for begin in range(0, len(order), QUESTIONS_AT_ONCE):
        questions = order[begin : begin + QUESTIONS_AT_ONCE]
        following = odds[order[begin + len(questions)]] if begin + len(questions) < len(order) else np.nan
        values = odds[questions]
        yield questions, np.append(values[1:], following) != values


def _bucket(value: int, ends: tuple[int, ...]) -> str:
    """The range that holds the value; `ends` are the last values of all ranges but the open one."""
    begin = 0
    for end in ends:
        if value <= end:
            return str(end) if begin == end else f"{begin}-{end}"
        begin = end + 1
    return f"{begin}+"


def _shares(values: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    def first_number(name: str) -> tuple[int, str]:
        digits = re.match(r"\d+", name)
        return (int(digits.group()) if digits else 0, name)

    return {
        value: {"questions": int(count), "exact": 100.0 * exact / count, "f1": 100.0 * f1 / count}
        for value, (count, exact, f1) in sorted(values.items(), key=lambda item: first_number(item[0]))
    }


def _snippet(example: Example, prediction: Prediction, golds: tuple[str, ...]) -> str:
    """The context around the predicted answer, or around the first located gold answer if none was given."""
    begin = next((start for text, *_, start in prediction.nbest if text == prediction.text and text), -1)
    length = len(prediction.text)
    if begin < 0 and golds:
        begin, length = max(example.context.find(golds[0]), 0), len(golds[0])
    begin = max(begin, 0)
    first, last = max(0, begin - SNIPPET_CHARACTERS), min(len(example.context), begin + length + SNIPPET_CHARACTERS)
    head, tail = "…" if first else "", "…" if last < len(example.context) else ""
    return head + example.context[first:last] + tail
