"""How often a run logs, evaluates and saves, in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass

from qa_deepspeed.config.option_groups import EPOCH
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.utils.errors import UserError

LOG_LINES = 100
"""Log lines of a run without logging_steps, about; longer runs have more."""

LONGEST_LOG_INTERVAL = 500
EVAL_STEPS = 500
"""Optimizer steps between evaluations where neither eval_steps nor logging_steps is given."""


@dataclass(frozen=True)
class Intervals:
    """Optimizer steps from one log line, evaluation or checkpoint to the next; 0 for none."""

    log: int
    evaluate: int
    save: int

    @classmethod
    def of(cls, options: RunOptions, steps: int, epoch_steps: int) -> Intervals:
        """Those of a run of `steps` optimizer steps, `epoch_steps` of which are an epoch.

        Raises:
            UserError: as `step_interval`.
        """
        log = options.logging_steps or min(LONGEST_LOG_INTERVAL, max(1, round(steps / LOG_LINES)))
        evaluate: float | str = options.logging_steps or EVAL_STEPS
        if options.eval_steps is not None:
            evaluate = options.eval_steps
        return cls(
            log,
            step_interval("eval_steps", evaluate, steps, epoch_steps) if options.evaluates_during_training else 0,
            step_interval("save_steps", options.save_steps, steps, epoch_steps),
        )

    def evaluations(self, steps: int) -> int:
        """Evaluations of a run of `steps` steps before its last step."""
        return (steps - 1) // self.evaluate if self.evaluate else 0


def step_interval(name: str, value: float | str, steps: int, epoch_steps: int) -> int:
    """The optimizer steps that the option `name` means by `value`; 0 for none.

    Args:
        value: a whole number of steps, below 1 a fraction of the run's `steps`, or `epoch`: the steps of an epoch.
    Raises:
        UserError: it is none of these.
    """
    if value == EPOCH:
        return epoch_steps
    number = float(value)
    if not 0 <= number < float("inf") or (number >= 1 and number != int(number)):
        raise UserError(
            f"{name} {number:g} is neither a number of steps, nor a fraction of the run below 1, nor {EPOCH}"
        )
    return max(1, round(number * steps)) if 0 < number < 1 else int(number)
