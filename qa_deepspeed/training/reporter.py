"""The log of a run: one line a log step, TensorBoard and metrics.jsonl. Rank 0 writes, others have a null object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from qa_deepspeed.qa.report.result import EvaluationResult
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.files import write_bytes
from qa_deepspeed.utils.json_files import NUMBER, DamagedFile, parse_json
from qa_deepspeed.utils.progress import ProgressBar
from qa_deepspeed.utils.units import plural

METRICS_FILE = "metrics.jsonl"


class NullMetricsLogger:
    """The logger of ranks other than 0: does nothing."""

    def log(self, step: int, values: Mapping[str, float], line: str) -> None:
        """Nothing."""

    def evaluation(self, step: int, result: EvaluationResult | None) -> None:
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

    def evaluation(self, step: int, result: EvaluationResult | None) -> None:
        """Show charts, tables and samples of an evaluation after optimizer step `step`, if anything was scored."""
        if result is not None:
            self._board.evaluation(step, result)

    def advance(self) -> None:
        """Count one optimizer step. The bar closes after the last one, since the evaluation has a bar of its own."""
        self._progress.advance()
        self._steps_left -= 1
        if not self._steps_left:
            self._progress.close()

    def end(self, hyperparameters: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Record the finished run: hyperparameters and final scores."""
        self._board.end(hyperparameters, metrics)

    def close(self) -> None:
        """End the files and the bar."""
        self._progress.close()
        self._board.close()
        self._metrics.close()


def _open_metrics(path: Path, done_steps: int) -> TextIO:
    """metrics.jsonl for appending, without damaged lines and lines of steps that the resumed run repeats.

    A last line without its end is what a killed run leaves, and is left out without a word.
    """
    kept, damaged = [], []
    if path.is_file():
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                if line and parse_json(line, {"step": NUMBER}, f"line {number}")["step"] <= done_steps:
                    kept.append(line + b"\n")
            except DamagedFile as error:
                damaged += [str(error)] * (number < len(lines))
        write_bytes(path, b"".join(kept))
    if damaged:
        dist.log0(f"{path}: {plural(len(damaged), 'line')} left out as damaged ({damaged[0]})")
    return path.open("a", encoding="utf-8")


def make_metrics_logger(output_dir: Path, total_steps: int, done_steps: int) -> NullMetricsLogger:
    """A MetricsLogger on rank 0, a null object elsewhere."""
    return MetricsLogger(output_dir, total_steps, done_steps) if dist.is_rank_zero() else NullMetricsLogger()
