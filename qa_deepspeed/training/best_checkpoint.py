"""Best checkpoint and early stopping. Every rank has the same metrics and decides the same without communication."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.checkpoints.checkpoint_files import checkpoint_name
from qa_deepspeed.utils.errors import UserError


class BestCheckpoint:
    """Tracks one metric over the evaluations of a run; without `metric_for_best_model` it does nothing.

    Attributes:
        metric: name of the metric, or None.
        step: optimizer step of the best value, or None before the first evaluation.
        rows: global batch size of the steps up to `step`.
        value: the best value; a loss is negated, so that higher is better.
        waited: evaluations since the best one.
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
                raise UserError(f"{name} needs a metric: pass --metric_for_best_model, such as f1")
        if self.metric and not options.evaluates_during_training:
            raise UserError(
                "metric_for_best_model needs evaluations while training: pass --eval_steps or evaluate_during_training"
            )
        if self._patience is not None and self._patience < 1:
            raise UserError(f"early_stopping_patience must be at least 1, not {self._patience}")

    @property
    def watching(self) -> bool:
        """Whether a metric is tracked."""
        return self.metric is not None

    def observe(self, metrics: Mapping[str, Any], step: int, rows: int) -> bool:
        """Record the evaluation after `step` optimizer steps of `rows` rows; returns whether it is the best so far.

        A lower loss is better; of all other metrics a higher value is better. Of equal values the first stays the best.

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
    def should_stop_early(self) -> bool:
        """Whether early stopping applies: no better value in the last `early_stopping_patience` evaluations."""
        return self._patience is not None and self.waited >= self._patience

    def checkpoint(self, rows: int) -> str | None:
        """Folder name of the best checkpoint in a run of `rows` rows a step; None before the first evaluation."""
        return None if self.step is None else checkpoint_name(self.step, self.rows, rows)

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON values, for a checkpoint's loop state."""
        return {
            "metric": self.metric,
            "step": self.step,
            "rows": self.rows,
            "waited": self.waited,
            "value": self.value if self.step is not None else None,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint; ignored if the run now tracks another metric."""
        if saved["metric"] == self.metric and saved["step"] is not None:
            self.step, self.rows = saved["step"], saved["rows"]
            self.value, self.waited = saved["value"], saved["waited"]
