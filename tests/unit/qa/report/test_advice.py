"""What the page recommends, from made reports."""

from __future__ import annotations

from typing import Any

from qa_deepspeed.qa.report.advice import advice
from qa_deepspeed.qa.report.errors import CLASSES


def report(**changes: Any) -> dict[str, Any]:
    """A v2.0 report in which nothing stands out."""
    metrics = {"f1": 91.0, "exact": 88.0, "tuned_f1": 91.04, "tuned_f1_thresh": 0.0, "crossfit_f1": 91.0}
    errors = {name: {"questions": 0, "lost_f1": 0.0, "part_of_lost_f1": 0.0} for name in CLASSES}
    return {
        "metrics": metrics | changes.pop("metrics", {}),
        "errors": errors | changes.pop("errors", {}),
        "slices": {},
        "calibration": {"expected_calibration_error": 0.02, "bins": []},
        **changes,
    }


def words(**changes: Any) -> list[str]:
    return [one.words for one in advice(report(**changes))]


def test_nothing_to_say_is_said() -> None:
    assert words() == ["Nothing stands out: all answers are right, or wrong in ways that have little in common."]


def test_a_threshold_is_recommended_where_it_lasts() -> None:
    better = {"tuned_f1": 93.84, "tuned_f1_thresh": -2.671, "crossfit_f1": 92.9}
    (found,) = words(metrics=better)
    assert "A null threshold of -2.67 would give F1 93.8 here instead of 91.0, and about 92.9 on new data" in found
    (found,) = words(metrics=better | {"crossfit_f1": 90.5})
    assert "but not on new ones: expect 90.5 there" in found
    (found,) = words(metrics=better | {"untuned_f1": 90.1})
    assert "-2.67 was tuned on these questions: F1 91.0, against 90.1 at 0. Expect about 92.9 on new data" in found


def test_a_threshold_to_set_comes_first_and_one_to_leave_last() -> None:
    errors = {"missed": {"questions": 2, "lost_f1": 9.0, "part_of_lost_f1": 1.0}}
    better = {"tuned_f1": 93.84, "crossfit_f1": 92.9}
    assert "null threshold" in words(metrics=better, errors=errors)[0]
    assert "Leave it as it is" in words(metrics=better | {"crossfit_f1": 90.0}, errors=errors)[-1]


def test_the_dearest_class_of_errors_comes_first() -> None:
    errors = {
        "boundary": {"questions": 37, "lost_f1": 3.0, "part_of_lost_f1": 0.41},
        "should_be_empty": {"questions": 1, "lost_f1": 3.5, "part_of_lost_f1": 0.5},
        "missed": {"questions": 2, "lost_f1": 0.3, "part_of_lost_f1": 0.09},
    }
    found = advice(report(errors=errors))
    assert [one.outcome for one in found] == ["should_be_empty", "boundary"]
    assert found[0].words.startswith("50% of the lost F1: should be empty (1 question), answered, although")
    assert found[1].words.startswith("41% of the lost F1: boundary (37 questions), right place, other words")


def test_the_weakest_slice_is_one_that_is_surely_below() -> None:
    def cell(f1: float, questions: int, high: float) -> dict[str, Any]:
        return {"f1": f1, "exact": f1, "questions": questions, "intervals": {"f1": [f1 - 5, high], "exact": [0, 0]}}

    slices = {
        "question_word": {"why": cell(52.1, 38, 60.2), "who": cell(90.0, 900, 92.0), "how": cell(10.0, 2, 20.0)},
        "answerable": {"yes": cell(50.0, 500, 60.0)},
        "windows": {"1": {"f1": 0.0, "exact": 0.0, "questions": 500}},
    }
    (found,) = words(slices=slices)
    assert found.startswith("Weakest kind of question: question word (why), F1 52.1 (47.1 to 60.2) on 38 questions")


def test_misleading_confidence_is_named() -> None:
    bins = [
        {"questions": 30, "confidence": 0.9, "accuracy": 0.5},
        {"questions": 10, "confidence": 0.5, "accuracy": 0.1},
    ]
    (found,) = words(calibration={"expected_calibration_error": 0.4, "bins": bins})
    assert found.startswith("Confidence is 40 points away from how often answers are right (80% against 40% over all")
