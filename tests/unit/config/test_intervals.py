"""How often a run logs, evaluates and saves: each by its own option."""

from typing import Any

import pytest

from qa_deepspeed.config.intervals import Intervals, step_interval
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.utils.errors import UserError


@pytest.mark.parametrize(
    ("value", "steps", "interval"),
    [(500, 12, 500), (0, 12, 0), (0.1, 1000, 100), (0.25, 10, 2), (0.001, 10, 1), (1, 5, 1), ("epoch", 1000, 40)],
)
def test_an_interval_is_a_number_a_fraction_of_the_run_or_an_epoch(
    value: float | str, steps: int, interval: int
) -> None:
    assert step_interval("save_steps", value, steps, epoch_steps=40) == interval


@pytest.mark.parametrize("value", [-1, 1.5, -0.1, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["save_steps", "eval_steps"])
def test_invalid_intervals_are_refused(name: str, value: float) -> None:
    options = RunOptions(**{name: value, "given": frozenset({name})})
    with pytest.raises(UserError, match=f"{name} .* is neither a number of steps, nor a fraction"):
        Intervals.of(options, 100, 10)


def of(steps: int, **given: Any) -> Intervals:
    return Intervals.of(RunOptions(**given, given=frozenset(given)), steps, 30)


@pytest.mark.parametrize(("steps", "log"), [(1, 1), (60, 1), (340, 3), (20_000, 200), (10**6, 500)])
def test_a_run_logs_about_a_hundred_times_and_at_least_every_500_steps(steps: int, log: int) -> None:
    assert of(steps).log == log
    assert of(steps, logging_steps=7).log == 7


def test_evaluations_count_apart_from_log_lines_where_they_are_asked_to() -> None:
    assert of(1000).evaluate == 0
    assert of(1000, evaluate_during_training=True).evaluate == 500  # as before
    assert of(1000, evaluate_during_training=True, logging_steps=20).evaluate == 20  # as before
    assert of(1000, evaluate_during_training=True, logging_steps=20, eval_steps=70).evaluate == 70
    assert of(1000, eval_steps="epoch", save_steps="epoch", logging_steps=20) == Intervals(20, 30, 30)
    assert of(1000, eval_steps=0.1).evaluate == 100
    assert of(1000, eval_steps=100, evaluate_during_training=False).evaluate == 0


def test_evaluations_before_the_end_are_counted() -> None:
    assert Intervals(1, 30, 0).evaluations(steps=90) == 2
    assert Intervals(1, 30, 0).evaluations(steps=91) == 3
    assert Intervals(1, 0, 0).evaluations(steps=91) == 0
