"""What a run tells: one line a log step, TensorBoard and metrics.jsonl. Rank 0 writes, others have a null object."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from qa_deepspeed.qa.report.samples import EvaluationView
from qa_deepspeed.training.tensorboard import read_report
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.progress import ProgressBar

METRICS_FILE = "metrics.jsonl"


class NullMetricsLogger:
    """What the other ranks report to: nothing happens."""

    def log(self, step: int, values: Mapping[str, float], line: str) -> None:
        """Nothing."""

    def evaluation(self, step: int, view: Callable[[], EvaluationView]) -> None:
        """Nothing; the view is not made."""

    def show_evaluation(self, step: int, output_dir: Path) -> None:
        """Nothing."""

    def advance(self) -> None:
        """Nothing."""

    def end(self, hyperparameters: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class MetricsLogger(NullMetricsLogger):
    """Writes TensorBoard events, metrics.jsonl and the lines on the screen, with a progress bar on terminals."""

    def __init__(self, output_dir: Path, total_steps: int, done_steps: int) -> None:
        from qa_deepspeed.training.tensorboard import TensorBoard

        self._board = TensorBoard(output_dir, done_steps)
        self._metrics = _open_metrics(output_dir / METRICS_FILE, done_steps)
        self._progress = ProgressBar("training", total_steps, "step", lines=False, done=done_steps)
        self._steps_left = total_steps - done_steps

    def log(self, step: int, values: Mapping[str, float], line: str) -> None:
        """Record named values of an optimizer step (names like `train/loss`), and print `line`."""
        self._board.scalars(step, values)
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        dist.log0(line)

    def evaluation(self, step: int, view: Callable[[], EvaluationView]) -> None:
        """Show an evaluation question by question."""
        self._board.evaluation(step, view())

    def show_evaluation(self, step: int, output_dir: Path) -> None:
        """Add figures and tables of the evaluation whose report lies in `output_dir`."""
        self._board.report(step, read_report(output_dir))

    def advance(self) -> None:
        """Count one optimizer step. After the last one the bar is done: what follows has its own."""
        self._progress.advance()
        self._steps_left -= 1
        if not self._steps_left:
            self._progress.close()

    def end(self, hyperparameters: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """The run is finished: what it was, and its final scores."""
        self._board.end(hyperparameters, metrics)

    def close(self) -> None:
        """End the files and the bar."""
        self._progress.close()
        self._board.close()
        self._metrics.close()


def _open_metrics(path: Path, done_steps: int) -> TextIO:
    """metrics.jsonl for appending, without lines of steps that are to come again, or that were cut off."""
    kept = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                if json.loads(line)["step"] <= done_steps:
                    kept.append(line + "\n")
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(path)
    return path.open("a", encoding="utf-8")


def make_metrics_logger(output_dir: Path, total_steps: int, done_steps: int) -> NullMetricsLogger:
    """A MetricsLogger on rank 0, a null object elsewhere."""
    return MetricsLogger(output_dir, total_steps, done_steps) if dist.is_rank_zero() else NullMetricsLogger()
