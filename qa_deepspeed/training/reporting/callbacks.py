"""Functions of the caller that a run calls: after a log line, an evaluation, a save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa_deepspeed.utils import dist

OnLog = Callable[[int, dict[str, float]], object]
OnEvaluate = Callable[[int, dict[str, Any]], object]
OnSave = Callable[[int, Path], object]


@dataclass(frozen=True)
class Callbacks:
    """The callbacks of `train`, each with the optimizer step (counted from 1) first. Rank 0 calls them.

    An error that one raises ends the run.

    on_log: with the values of a log line by name (`train/loss`, `speed/tokens_per_second`, ...).
    on_evaluate: with the metrics of an evaluation, those of metrics.json.
    on_save: with the folder of a checkpoint, or at the end the run's folder, which then holds the final model.
    """

    on_log: OnLog | None = None
    on_evaluate: OnEvaluate | None = None
    on_save: OnSave | None = None

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        """Call on_log on rank 0."""
        if self.on_log is not None and dist.is_rank_zero():
            self.on_log(step, dict(values))

    def evaluated(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Call on_evaluate on rank 0."""
        if self.on_evaluate is not None and dist.is_rank_zero():
            self.on_evaluate(step, dict(metrics))

    def saved(self, step: int, folder: Path) -> None:
        """Call on_save on rank 0."""
        if self.on_save is not None and dist.is_rank_zero():
            self.on_save(step, folder)


NO_CALLBACKS = Callbacks()
