"""What to do next, in words: read off the numbers of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qa_deepspeed.qa.report.errors import BOUNDARY, CLASSES, GOLD_DOUBTFUL, MISSED, RIGHT, SHOULD_BE_EMPTY, WRONG_PLACE
from qa_deepspeed.qa.report.words import SLICES, interval, percent

WORTH_TUNING = 0.1
"""Points of F1 that another null threshold must give to be recommended."""

WORTH_READING = 0.1
"""The part of the lost F1 that a class of errors must have to be named."""

CLASSES_NAMED = 3
"""At most so many classes of errors are spoken of; the table below shows all."""

WORTH_CALIBRATING = 0.1
"""The expected calibration error from which confidence is called misleading."""

STEPS = {
    BOUNDARY: "Look for a pattern: titles, units, articles or clauses that gold answers take in or leave out.",
    WRONG_PLACE: "Look for what the answers have in common with the right place, such as a second name or date.",
    MISSED: "A higher null threshold leaves fewer questions empty.",
    SHOULD_BE_EMPTY: "A lower null threshold, or more unanswerable questions in training, leaves more of them empty.",
    GOLD_DOUBTFUL: "Check these gold answers first: qa-deepspeed audit FILE --show 20 prints them in their contexts.",
}
"""What to do about a class of errors."""


@dataclass(frozen=True)
class Advice:
    """One sentence or two; `outcome` is the class of errors that it speaks of, "" for none."""

    words: str
    outcome: str = ""


def advice(report: Mapping[str, Any]) -> list[Advice]:
    """What the report says about the next step, the most useful first.

    Args:
        report: the content of report.json.
    """
    others = [*_errors(report["errors"]), *_weakest_slice(report), *_calibration(report)]
    recommended, unchanged = _threshold(report["metrics"])
    found = [*recommended, *others, *unchanged]
    return found or [Advice("Nothing stands out: all answers are right, or wrong in ways that have little in common.")]


def _threshold(metrics: Mapping[str, Any]) -> tuple[list[Advice], list[Advice]]:
    """A threshold to set, and what is said of one that stays as it is."""
    if "tuned_f1" not in metrics:
        return [], []
    tuned, threshold, expected = (metrics[name] for name in ("tuned_f1", "tuned_f1_thresh", "crossfit_f1"))
    if "untuned_f1" in metrics:
        words = (
            f"The null threshold {threshold:.2f} was tuned on these questions: F1 {metrics['f1']:.1f}, against "
            f"{metrics['untuned_f1']:.1f} at 0. Expect about {expected:.1f} on new data."
        )
        return [], [Advice(words)]
    if tuned - metrics["f1"] < WORTH_TUNING:
        return [], []
    if expected > metrics["f1"]:
        words = (
            f"A null threshold of {threshold:.2f} would give F1 {tuned:.1f} here instead of {metrics['f1']:.1f}, and "
            f"about {expected:.1f} on new data: --null_score_diff_threshold auto finds and stores it."
        )
        return [Advice(words)], []
    words = (
        f"A null threshold of {threshold:.2f} would give F1 {tuned:.1f} on these questions, but not on new ones: "
        f"expect {expected:.1f} there. Leave it as it is."
    )
    return [], [Advice(words)]


def _errors(errors: Mapping[str, Mapping[str, Any]]) -> Iterator[Advice]:
    """The classes that cost most, the most expensive first."""
    wrong = sorted(CLASSES.keys() - {RIGHT}, key=lambda name: (-errors[name]["lost_f1"], name))
    for name in wrong[:CLASSES_NAMED]:
        part, count = errors[name]["part_of_lost_f1"], errors[name]["questions"]
        if part >= WORTH_READING:
            label, meaning = CLASSES[name]
            questions = f"{count:,} question" + ("" if count == 1 else "s")
            yield Advice(
                f"{percent(part)} of the lost F1: {label.lower()} ({questions}), {meaning}. {STEPS[name]}", name
            )


def _weakest_slice(report: Mapping[str, Any]) -> Iterator[Advice]:
    """The slice, surely below the whole, that costs most F1."""
    whole = report["metrics"]["f1"]
    costs = [
        ((whole - cell["f1"]) * cell["questions"], name, value, cell)
        for name, cells in report["slices"].items()
        if name != "answerable"
        for value, cell in cells.items()
        if "intervals" in cell and cell["intervals"]["f1"][1] < whole
    ]
    if costs:
        _, name, value, cell = max(costs, key=lambda cost: cost[0])
        yield Advice(
            f"Weakest kind of question: {SLICES[name].lower()} ({value}), F1 {cell['f1']:.1f} "
            f"({interval(cell['intervals']['f1'])}) on {cell['questions']:,} questions, against {whole:.1f} on all."
        )


def _calibration(report: Mapping[str, Any]) -> Iterator[Advice]:
    found = report["calibration"]
    if found["expected_calibration_error"] < WORTH_CALIBRATING:
        return
    count = sum(one["questions"] for one in found["bins"])
    confident, right = (
        sum(one["questions"] * one[name] for one in found["bins"]) / count for name in ("confidence", "accuracy")
    )
    yield Advice(
        f"Confidence is {100 * found['expected_calibration_error']:.0f} points away from how often answers are right "
        f"({percent(confident)} against {percent(right)} over all questions): do not take it for a probability."
    )
