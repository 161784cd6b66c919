"""Best checkpoint and early stopping, and both after a resume."""

from typing import Any

import pytest

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.training.best_checkpoint import BestCheckpoint
from qa_deepspeed.utils.errors import UserError


def tracker(metric: str, patience: int | None = None) -> BestCheckpoint:
    return BestCheckpoint(
        RunOptions(metric_for_best_model=metric, early_stopping_patience=patience, evaluate_during_training=True)
    )


def test_a_higher_f1_is_better_and_ties_keep_the_first() -> None:
    best = tracker("f1")
    assert [best.observe({"f1": value}, step, 8) for step, value in enumerate((50, 60, 60, 55, 61))] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert (best.step, best.checkpoint(8), best.should_stop_early) == (4, "checkpoint-4", False)


def test_a_lower_loss_is_better() -> None:
    best = tracker("loss")
    assert [best.observe({"loss": value}, step, 8) for step, value in enumerate((3, 2.5, 2.7))] == [True, True, False]


def test_early_stopping_patience_survives_a_resume() -> None:
    first = tracker("f1", patience=2)
    for step, value in ((10, 50), (20, 40)):
        first.observe({"f1": value}, step, 8)
    again = tracker("f1", patience=2)
    again.restore(first.to_dict())
    assert not again.should_stop_early and not again.observe({"f1": 45}, 15, 16)
    assert again.should_stop_early and (again.checkpoint(8), again.checkpoint(16)) == (
        "checkpoint-10",
        "checkpoint-10.batch8",
    )


def test_another_metric_starts_without_a_best_value() -> None:
    first = tracker("f1")
    first.observe({"f1": 50}, 10, 8)
    other = tracker("exact")
    other.restore(first.to_dict())
    assert other.step is None and other.observe({"exact": 1}, 20, 8)


def test_without_a_metric_nothing_is_tracked() -> None:
    best = BestCheckpoint(RunOptions())
    assert (
        not best.watching
        and not best.observe({"f1": 1}, 1, 8)
        and not best.should_stop_early
        and best.checkpoint(8) is None
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"early_stopping_patience": 2}, "metric_for_best_model"),
        ({"load_best_model_at_end": True}, "metric_for_best_model"),
        ({"metric_for_best_model": "f1"}, "evaluate_during_training"),
        ({"metric_for_best_model": "f1", "evaluate_during_training": True, "early_stopping_patience": 0}, "at least 1"),
    ],
)
def test_contradicting_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        BestCheckpoint(RunOptions(**options))


def test_the_error_for_an_unknown_metric_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="'F1' is not among the metrics of this run: exact, f1"):
        tracker("F1").observe({"exact": 1.0, "f1": 2.0, "null": None}, 3, 8)
