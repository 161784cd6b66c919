"""torch's profiler over a few optimizer steps of rank 0: a trace that TensorBoard and Perfetto show."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from qa_deepspeed.training.reporting.reporter import may_be_lost
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError


def profiled_steps(text: str | None) -> range:
    """The optimizer steps (counted from 1) of a text like `10-12` or `10`; none for None.

    Raises:
        UserError: the text has another form.
    """
    if text is None:
        return range(0)
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text.strip())
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"profile_steps '{text}' must be a step like 10, or steps like 10-12, counted from 1")
    return range(first, last + 1)


class StepProfiler:
    """Records the steps of `profile_steps`, with the step before them as a warm-up of the profiler."""

    def __init__(self, profile_steps: str | None, output_dir: Path, done_steps: int) -> None:
        """done_steps: steps that are not repeated; what is asked of them is not recorded."""
        from qa_deepspeed.training.reporting.tensorboard import FOLDER

        steps = profiled_steps(profile_steps)
        self._steps = range(max(steps.start, done_steps + 1), steps.stop) if dist.is_rank_zero() else range(0)
        self._begin = max(self._steps.start - 1, done_steps + 1)
        self._folder = output_dir / FOLDER
        self._profile: profile | None = None
        self._last = 0

    def begin(self, number: int) -> None:
        """Call before optimizer step `number`."""
        if not self._steps or number != self._begin:
            return
        warmup = self._steps.start - self._begin
        self._profile = profile(
            activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available(),
            schedule=schedule(wait=0, warmup=warmup, active=len(self._steps), repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profile.start()

    def end(self, number: int) -> None:
        """Call after optimizer step `number`; after the last one the trace is written."""
        if self._profile is None:
            return
        self._last = number
        self._profile.step()
        if number == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """End the recording; of a run that ends before the last step, with the steps so far."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, recorded: profile) -> None:
        with may_be_lost(self._folder):
            tensorboard_trace_handler(str(self._folder), worker_name=f"rank{dist.rank()}")(recorded)
            steps = f"trace of steps {self._steps[0]} to {self._last}"
            shown = "TensorBoard with torch-tb-profiler, or ui.perfetto.dev"
            dist.log0(f"{steps}: {self._folder}/*.pt.trace.json ({shown})")
