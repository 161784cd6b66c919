"""The dynamic loss scale of float16, carried into an engine of another number of ranks or stage.

Private names of DeepSpeed's scaler, which `check_supported` looks for. Stage 0 has none: float16 is refused there.
"""

from __future__ import annotations

import functools
from typing import Any

from qa_deepspeed.utils.supported import require_names

NAMES = {
    "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler": "cur_scale cur_iter last_overflow_iter cur_hysteresis",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer": "loss_scaler",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3": "loss_scaler",
}
"""Module or "module:class" -> names in it."""

STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes while it runs; the rest are settings of the config."""


@functools.cache
def check_supported() -> None:
    """Check once in a process that all of these names are there.

    Raises:
        UserError: one is missing.
    """
    require_names("deepspeed", {place: names.split() for place, names in NAMES.items()})


def saved_loss_scaler(shard: dict[str, Any]) -> Any:
    """DeepSpeed's scaler in the contents of a shard of stages 1 to 3."""
    return shard["optimizer_state_dict"].get("loss_scaler")


def carry_loss_scale(optimizer: Any, saved: Any) -> None:
    """Give the scaler of DeepSpeed's optimizer the state of a saved one, where both are dynamic."""
    check_supported()
    own = getattr(optimizer, "loss_scaler", None)
    if getattr(own, "dynamic", False) and getattr(saved, "dynamic", False):
        for name in STATE:
            setattr(own, name, getattr(saved, name))
