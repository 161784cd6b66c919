"""What a run tells: one line a log step, TensorBoard and metrics.jsonl. Rank 0 writes, others have a null object."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from qa_deepspeed import dist


class NullReporter:
    """What the other ranks report to: nothing happens."""

    def log(self, step: int, values: Mapping[str, float], line: str) -> None:
        """Nothing."""

    def advance(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Reporter(NullReporter):
    """Writes TensorBoard events, metrics.jsonl and the lines on the screen, with a progress bar on terminals."""

    def __init__(self, output_dir: Path, total_steps: int, done_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=done_steps + 1 if done_steps else None)
        self._metrics = (output_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._bar = tqdm(
            total=total_steps, initial=done_steps, unit="step", desc="training", disable=not sys.stderr.isatty()
        )

    def log(self, step: int, values: Mapping[str, float], line: str) -> None:
        """Record named values of an optimizer step (names like `train/loss`), and print `line`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def advance(self) -> None:
        """Count one optimizer step."""
        self._bar.update()

    def close(self) -> None:
        """End the files and the bar."""
        self._bar.close()
        self._writer.close()
        self._metrics.close()


def make_reporter(output_dir: Path, total_steps: int, done_steps: int) -> NullReporter:
    """A Reporter on rank 0, a null object elsewhere."""
    return Reporter(output_dir, total_steps, done_steps) if dist.is_first() else NullReporter()
