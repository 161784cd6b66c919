"""Forward passes of an answerer: its device and dtype, batches of windows, and threads that work on several at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from qa_deepspeed.utils.errors import UserError

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1_536, 49_152
"""Tokens per forward pass where no batch_size is given; larger batches speed up GPUs, but not CPUs."""

MAX_PARALLEL_BATCHES = 8
"""Batches in progress at the same time on CPUs: with more, Python's interpreter lock limits the speed."""


def chosen_device(device: torch.device | str | int | None) -> torch.device:
    """The device of this name or number (-1: the CPU); None for a GPU if there is one.

    Raises:
        UserError: there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, int):
        return torch.device("cpu" if device < 0 else f"cuda:{device}")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type == "meta":
        raise UserError(f"there is no device '{device}'; pass cpu, cuda or cuda:0")
    return found


def chosen_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype of this name; float32 for None, as in a config without a dtype.

    Raises:
        UserError: there is no such dtype, or it is one of whole numbers.
    """
    kind = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UserError(f"there is no dtype '{dtype}'; pass float32, bfloat16 or float16")
    return kind


def changes_in_forward(model: torch.nn.Module) -> bool:
    """Whether a forward pass changes the model: some rotary embeddings adapt their frequencies to the row length."""
    kinds = (str(getattr(module, "rope_type", "")) for module in model.modules())
    return any("dynamic" in kind or "longrope" in kind for kind in kinds)


def batches_of(lengths: np.ndarray, rows: int | None, device: torch.device) -> Iterator[np.ndarray]:
    """Batches of windows of similar length, longest first: `rows` windows each, or by tokens for the device."""
    order = np.argsort(-lengths, kind="stable")
    tokens = CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
    begin = 0
    while begin < len(order):
        size = rows or max(1, tokens // int(lengths[order[begin]]))
        yield order[begin : begin + size]
        begin += size


def on_all_cores(work: Callable[[Any], Any], parts: Sequence[Any]) -> Iterator[Any]:
    """Yield `work(part)` of each part, in order; threads work on several parts at once, one per core.

    They are as many as torch has threads, at most `MAX_PARALLEL_BATCHES`. A core that runs a whole forward pass waits
    for no other core; cores that split every operation of one pass do.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(parts), MAX_PARALLEL_BATCHES)
    if workers < 2:
        yield from map(work, parts)
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        yield from pool.map(work, parts)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # new threads inherit the number that was set last
