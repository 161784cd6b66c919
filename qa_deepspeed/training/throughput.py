"""What the log lines tell of the training: loss, rates, padding, where the time goes, how much of the roof is used."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch

from qa_deepspeed.utils import dist
from qa_deepspeed.utils.units import GIB

PHASES = ("data", "forward", "backward", "update")


class StepTimer:
    """Adds up the time of each phase until it is read; on GPUs by events in the stream, read when all have passed."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside counts as `name`."""
        if not self._on_gpu:
            began = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - began
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((name, first, last))

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last reading."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, first, last in self._events:
            self._seconds[name] += first.elapsed_time(last) / 1000
        seconds, self._seconds, self._events = self._seconds, dict.fromkeys(PHASES, 0.0), []
        return seconds


class ThroughputMeter:
    """Adds up what the log lines tell. The loss stays on the device until it is read, so that no step waits for it."""

    def __init__(self, device: torch.device, flops: tuple[float, float], roof: float) -> None:
        """flops: operations per token, and per pair of tokens of a row, of a training step; roof: operations a second
        that this rank's device can do."""
        self._device, self._flops, self._roof = device, flops, roof
        self.clock = StepTimer(device)
        self._whole = {"questions": 0.0, "tokens": 0.0, "seconds": 0.0}
        self._clear()

    def _clear(self) -> None:
        self._loss = torch.zeros((), device=self._device)
        self._tokens = self._pairs = self._rows = self._places = self._steps = 0
        self._began = time.perf_counter()

    def add(self, share: torch.Tensor, lengths: np.ndarray, padded: int) -> None:
        """Count a micro-batch: its share of the global batch's loss, its rows' real and padded lengths, in tokens."""
        self._loss += share
        self._rows += len(lengths)
        self._tokens += int(lengths.sum())
        self._pairs += int((lengths.astype(np.int64) ** 2).sum())
        self._places += len(lengths) * padded

    def end_step(self) -> None:
        """Count an optimizer step."""
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Loss per step and rates over all ranks since the last reading; times are means over the ranks, memory
        is this rank's. Collective."""
        phases = self.clock.read()
        counts = [float(self._loss), self._tokens, self._pairs, self._rows, self._places, self._roof]
        sums = dist.all_reduce_sum([*counts, *phases.values()])
        loss, tokens, pairs, rows, places, roof = sums[: len(counts)]
        steps, elapsed = self._steps, time.perf_counter() - self._began
        self._clear()
        for name, value in (("questions", rows), ("tokens", tokens), ("seconds", elapsed)):
            self._whole[name] += value
        operations = self._flops[0] * tokens + self._flops[1] * pairs
        milliseconds = {
            f"speed/{name}_ms": 1000 * total / dist.world_size() / steps
            for name, total in zip(phases, sums[len(counts) :], strict=True)
        }
        return {
            "train/loss": loss / steps,
            "speed/questions_per_second": rows / elapsed,
            "speed/tokens_per_second": tokens / elapsed,
            "speed/padding": 1 - tokens / max(places, 1),
            "speed/mfu": operations / elapsed / roof,
            **milliseconds,
            **{f"memory/{name}": value for name, value in memory(self._device).items()},
        }

    def throughput(self) -> dict[str, float]:
        """Rates over all ranks and all that was read so far: evaluations and checkpoints do not count."""
        seconds = max(self._whole["seconds"], 1e-9)
        return {f"{name}_per_second": self._whole[name] / seconds for name in ("questions", "tokens")}


def memory(device: torch.device) -> dict[str, float]:
    """This rank's greatest use of memory so far, in GiB: of the process, and of the GPU, where there is one, by tensors
    since the training began (`roof.measured_peak_flops`)."""
    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes but on macOS
    used = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    if device.type == "cuda":
        used["gpu_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    return used


def peak_memory(device: torch.device) -> dict[str, float]:
    """The greatest of `memory` over all ranks, on rank 0; empty elsewhere. Collective."""
    mine = memory(device)
    gathered = dist.gather_rows({name: np.array([value]) for name, value in mine.items()})
    return {} if gathered is None else {name: float(values.max()) for name, values in gathered.items()}
