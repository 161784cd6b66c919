"""Step timer and throughput meter: loss, questions and tokens per second, padding, MFU, time by phase, memory."""

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
"""Parts of a training step that are timed."""


class StepTimer:
    """Sums the time of each phase until `read`; on GPUs by CUDA events, so that no phase synchronizes the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the enclosed block as phase `name`."""
        if not self._on_gpu:
            began = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - began
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
        first.record()
        yield
        last.record()
        self._events.append((name, first, last))

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last `read`."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, first, last in self._events:
            self._seconds[name] += first.elapsed_time(last) / 1000
        seconds, self._seconds, self._events = self._seconds, dict.fromkeys(PHASES, 0.0), []
        return seconds


class ThroughputMeter:
    """Sums loss, tokens and times between log lines. The loss stays on the device until `read`: no step waits."""

    def __init__(self, device: torch.device, flops: tuple[float, float], peak_flops: float) -> None:
        """Start measuring.

        Args:
            flops: FLOPs of a training step per token and per pair of tokens of a row (`engine.flops.training_flops`).
            peak_flops: measured peak FLOP/s of this rank's device (`engine.flops.measured_peak_flops`).
        """
        self._device, self._flops, self._peak_flops = device, flops, peak_flops
        self.clock = StepTimer(device)
        self._whole = {"questions": 0.0, "tokens": 0.0, "seconds": 0.0}
        self._clear()

    def _clear(self) -> None:
        self._loss = torch.zeros((), device=self._device)
        self._tokens = self._pairs = self._rows = self._computed_tokens = self._steps = 0
        self._began = time.perf_counter()

    def add(self, weighted_loss: torch.Tensor, lengths: np.ndarray, computed: int) -> None:
        """Count a micro-batch.

        Args:
            weighted_loss: its part of the global batch's mean loss, a scalar.
            lengths: tokens of each row without padding, `[rows]`.
            computed: tokens that the model worked on, padding and dummy rows included.
        """
        self._loss += weighted_loss
        self._rows += len(lengths)
        self._tokens += int(lengths.sum())
        self._pairs += int((lengths.astype(np.int64) ** 2).sum())
        self._computed_tokens += computed

    def end_step(self) -> None:
        """Count an optimizer step."""
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the enclosed block from the training time."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Values of a log line since the last `read`, by TensorBoard tag. Collective.

        The loss is the mean over the steps, rates are sums over the ranks, phase times means over the ranks; memory is
        this rank's.
        """
        phases = self.clock.read()
        counts = [float(self._loss), self._tokens, self._pairs, self._rows, self._computed_tokens, self._peak_flops]
        sums = dist.all_reduce_sum([*counts, *phases.values()])
        loss, tokens, pairs, rows, computed_tokens, peak_flops = sums[: len(counts)]
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
            "speed/padding": 1 - tokens / max(computed_tokens, 1),
            "speed/mfu": operations / elapsed / peak_flops,
            **milliseconds,
            **{f"memory/{name}": value for name, value in memory(self._device).items()},
        }

    def throughput(self) -> dict[str, float]:
        """Mean rates of the run so far, over all ranks, without evaluations and checkpoints."""
        seconds = max(self._whole["seconds"], 1e-9)
        return {f"{name}_per_second": self._whole[name] / seconds for name in ("questions", "tokens")}


def memory(device: torch.device) -> dict[str, float]:
    """This rank's peak memory in GiB: `host_gib` of the process, and on a GPU `gpu_gib` of tensors.

    The GPU's peak counts from the start of training: `engine.flops.measured_peak_flops` resets it.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    used = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    if device.type == "cuda":
        used["gpu_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    return used


def peak_memory(device: torch.device) -> dict[str, float]:
    """The largest values of `memory` over all ranks, on rank 0; empty on other ranks. Collective."""
    mine = memory(device)
    gathered = dist.gather_rows({name: np.array([value]) for name, value in mine.items()})
    return {} if gathered is None else {name: float(values.max()) for name, values in gathered.items()}
