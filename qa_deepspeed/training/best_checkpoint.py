"""The best model of a run and when to stop looking for a better one. Metrics are the same on all ranks, so is this."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.checkpoint_files import checkpoint_name
from qa_deepspeed.utils.errors import UserError


class BestCheckpoint:
    """Watches one metric over the evaluations of a run; without `metric_for_best_model` it watches nothing.

    Attributes: step: where the best value was, or None; rows: of one of those steps; value; waited: evaluations since.
    """

    def __init__(self, options: RunOptions) -> None:
        self.metric = options.metric_for_best_model
        self._patience = options.early_stopping_patience
        self.step: int | None = None
        self.rows = 0
        self.value = -math.inf
        self.waited = 0
        for name in ("early_stopping_patience", "load_best_model_at_end"):
            if getattr(options, name) and not self.metric:
                raise UserError(f"{name} goes by a metric: pass --metric_for_best_model, like f1")
        if self.metric and not options.evaluate_during_training:
            raise UserError("metric_for_best_model needs evaluations on the way: pass --evaluate_during_training")
        if self._patience is not None and self._patience < 1:
            raise UserError(f"early_stopping_patience must be at least 1, not {self._patience}")

    @property
    def watching(self) -> bool:
        """Whether there is a metric to go by."""
        return self.metric is not None

    def observe(self, metrics: Mapping[str, Any], step: int, rows: int) -> bool:
        """Take note of an evaluation after `step` optimizer steps of `rows` rows; whether it is the best so far.

        Losses are best low.

        Raises:
            UserError: the evaluation has no such metric.
        """
        if self.metric is None:
            return False
        if not isinstance(metrics.get(self.metric), (int, float)):
            known = ", ".join(name for name, value in metrics.items() if isinstance(value, (int, float)))
            raise UserError(f"metric_for_best_model '{self.metric}' is not among the metrics of this run: {known}")
        value = float(metrics[self.metric]) * (-1 if self.metric.endswith("loss") else 1)
        if value > self.value:
            self.step, self.rows, self.value, self.waited = step, rows, value, 0
            return True
        self.waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether the patience is at its end."""
        return self._patience is not None and self.waited >= self._patience

    def checkpoint(self, rows: int) -> str | None:
        """The name of the best model's checkpoint in a run whose steps have `rows` rows, if there is a best one yet."""
        return None if self.step is None else checkpoint_name(self.step, self.rows, rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "metric": self.metric,
            "step": self.step,
            "rows": self.rows,
            "waited": self.waited,
            "value": self.value if self.step is not None else None,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's values, unless another metric is watched now."""
        if saved["metric"] == self.metric and saved["step"] is not None:
            self.step, self.rows = saved["step"], saved["rows"]
            self.value, self.waited = saved["value"], saved["waited"]
