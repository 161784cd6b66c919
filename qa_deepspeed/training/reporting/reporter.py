"""The log of a run: one line a log step, TensorBoard and metrics.jsonl. Rank 0 writes, others have a null object.

A disk that is full or fails does not end a run for its log: it is reported once.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from qa_deepspeed.engine.monitors import Monitors
from qa_deepspeed.qa.report.result import EvaluationResult
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.files import disk_failure, write_bytes
from qa_deepspeed.utils.json_files import NUMBER, DamagedFile, parse_json
from qa_deepspeed.utils.progress import ProgressBar
from qa_deepspeed.utils.units import plural

T = TypeVar("T")

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


@contextlib.contextmanager
def may_be_lost(path: Path) -> Iterator[None]:
    """Inside, a disk that is full or fails costs only `path`, which nothing depends on, and one line says so."""
    try:
        yield
    except Exception as error:
        reason = disk_failure(error)
        if reason is None:
            raise
        dist.log0(f"{path} is no longer written ({reason}); the run continues")


class Dispensable(Generic[T]):
    """A record that ends, as `may_be_lost` says, when the disk is full or fails."""

    def __init__(self, path: Path, make: Callable[[], T | None]) -> None:
        """make: gives None for a record that is not wanted."""
        self._path = path
        self._record: T | None = None
        with may_be_lost(path):
            self._record = make()

    def use(self, act: Callable[[T], None]) -> None:
        """Call `act` with the record, unless it has ended."""
        record, self._record = self._record, None
        if record is not None:
            with may_be_lost(self._path):
                act(record)
                self._record = record


class MetricsFile:
    """metrics.jsonl, appended line by line. Lines that find no room follow as soon as there is some."""

    def __init__(self, path: Path, done_steps: int) -> None:
        """done_steps: incomplete lines, and lines of later steps, which the resumed run repeats, are removed."""
        _keep_lines(path, done_steps)
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (lives as long as the run)
        self._waiting = b""
        self._failed = False

    def append(self, line: str) -> None:
        """Add a line. The first failure of the disk is reported."""
        self._waiting += line.encode() + b"\n"
        self._write_waiting()

    def close(self) -> None:
        """End the file."""
        self._write_waiting()
        self._file.close()

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._failed:
                reason = disk_failure(error) or error.strerror
                dist.log0(f"{self._path} cannot be written ({reason}): its lines follow later; the run continues")
            self._failed = True


class MetricsLogger(NullMetricsLogger):
    """Writes TensorBoard events, metrics.jsonl, trackers and the lines on the screen, with a progress bar on terminals.

    board: whether TensorBoard is wanted. monitors: the trackers, if there are some.
    """

    def __init__(
        self, output_dir: Path, total_steps: int, done_steps: int, board: bool = True, monitors: Monitors | None = None
    ) -> None:
        from qa_deepspeed.training.reporting.tensorboard import FOLDER, TensorBoard

        self._board = Dispensable(output_dir / FOLDER, lambda: TensorBoard(output_dir, done_steps) if board else None)
        self._monitors = monitors
        metrics = output_dir / METRICS_FILE
        self._metrics = Dispensable(metrics, lambda: MetricsFile(metrics, done_steps))
        self._progress = ProgressBar("training", total_steps, "step", lines=False, done=done_steps)
        self._steps_left = total_steps - done_steps

    def log(self, step: int, values: Mapping[str, float], line: str) -> None:
        """Record named values of an optimizer step (names like `train/loss`), and print `line`."""
        from qa_deepspeed.training.reporting.tensorboard import curves

        self._board.use(lambda board: board.scalars(step, values))
        if self._monitors is not None:
            self._monitors.write(step, curves(values))
        self._metrics.use(lambda metrics: metrics.append(json.dumps({"step": step, **values})))
        dist.log0(line)

    def evaluation(self, step: int, result: EvaluationResult | None) -> None:
        """Show charts, tables and samples of an evaluation after optimizer step `step`, if anything was scored."""
        if result is not None:
            self._board.use(lambda board: board.evaluation(step, result))

    def advance(self) -> None:
        """Count one optimizer step. The bar closes after the last one, since the evaluation has a bar of its own."""
        self._progress.advance()
        self._steps_left -= 1
        if not self._steps_left:
            self._progress.close()

    def end(self, hyperparameters: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Record the finished run: hyperparameters and final scores."""
        self._board.use(lambda board: board.end(hyperparameters, metrics))

    def close(self) -> None:
        """End the files and the bar."""
        self._progress.close()
        self._board.use(lambda board: board.close())
        if self._monitors is not None:
            self._monitors.close()
        self._metrics.use(lambda metrics: metrics.close())


def read_history(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in a run's folder, without damaged ones; empty where there is no such file."""
    path, entries = output_dir / METRICS_FILE, []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        with contextlib.suppress(DamagedFile):
            if line:
                entries.append(dict(parse_json(line, {"step": NUMBER}, METRICS_FILE)))
    return entries


def _keep_lines(path: Path, done_steps: int) -> None:
    """Remove damaged lines from metrics.jsonl, and lines of steps that the resumed run repeats.

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


def make_metrics_logger(
    output_dir: Path, total_steps: int, done_steps: int, board: bool, monitors: Monitors | None
) -> NullMetricsLogger:
    """A MetricsLogger on rank 0, a null object elsewhere."""
    if not dist.is_rank_zero():
        return NullMetricsLogger()
    return MetricsLogger(output_dir, total_steps, done_steps, board, monitors)
