"""Out of memory in training: one line that says what needs less, with the memory plan's number for each."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from qa_deepspeed.engine.config_choice import Machines, Row, estimate_configs
from qa_deepspeed.engine.ds_config import ResolvedConfig
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.units import gib, plural

HOST_TEXTS = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
"""Parts of the messages by which torch and the system report that host memory is used up."""


@contextlib.contextmanager
def explain_out_of_memory(resolved: ResolvedConfig, model_config: Any, device: torch.device) -> Iterator[None]:
    """Inside, memory that is used up is an error of one line, with what needs less.

    Raises:
        UserError: in place of torch's or Python's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:  # torch's out-of-memory error is a RuntimeError
        if not _is_out_of_memory(error):
            raise
        place = "GPU" if isinstance(error, torch.OutOfMemoryError) else "host"
        detail = " ".join(str(error).split()).split(". ")[0][:160]
        lines = _ways_out(resolved, model_config, device)
        raise UserError(f"out of {place} memory{f' ({detail})' if detail else ''}: {lines}") from None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(text in str(error) for text in HOST_TEXTS)


def _ways_out(resolved: ResolvedConfig, model_config: Any, device: torch.device) -> str:
    """What needs less memory than this run, as a phrase with GiB of one rank by the memory plan."""
    options, rows = resolved.options, resolved.plan.micro_batch_size
    fewer = dataclasses.replace(options, per_gpu_train_batch_size=max(1, rows // 2), global_batch_size=None)
    try:
        now, others = _needs(resolved, options, model_config, device)
        less = _needs(resolved, fewer, model_config, device)[0] if rows > 1 else None
    except (UserError, MemoryError, RuntimeError):  # a model or config that the plan does not cover
        return "use fewer rows (--per_gpu_train_batch_size), --gradient_checkpointing or --deepspeed_config zero3"
    ways = [f"--deepspeed_config {name} {gib(size)}" for name, size in others.items()]
    if less is not None:
        ways.append(f"--per_gpu_train_batch_size {rows // 2} {gib(less[options.gradient_checkpointing])}")
    if not options.gradient_checkpointing:
        ways.append(f"--gradient_checkpointing {gib(now[True])}")
    size = f"{plural(rows, 'row')} of {options.max_seq_length} tokens"
    needed = gib(now[options.gradient_checkpointing])
    if not ways:
        return f"{resolved.name} with {size} needs {needed} GiB a rank by the memory plan; use more ranks"
    return f"{resolved.name} with {size} needs {needed} GiB a rank by the memory plan; {', '.join(ways)} GiB"


def _needs(
    resolved: ResolvedConfig, options: Any, model_config: Any, device: torch.device
) -> tuple[dict[bool, int], dict[str, int]]:
    """Bytes of a rank for the run's own config, without and with gradient checkpointing, and those of the config that
    needs least, if that is less."""
    ranks, here = dist.world_size(), dist.local_world_size()
    on_gpu = device.type == "cuda"
    machines = Machines(-(-ranks // here), here, 2**60 if on_gpu else None, 2**60)
    _, rows = estimate_configs(options, model_config, machines)

    def need(row: Row, checkpointing: bool) -> int:
        if on_gpu:
            return row.need.device(checkpointing)
        return row.need.host_of(1) - (row.need.activations - row.need.checkpointed) * checkpointing

    names = {resolved.name, resolved.name.removesuffix(".json"), options.deepspeed_config}
    own = next((row for row in rows if row.config in names), None)
    if own is None:
        raise UserError(f"the memory plan does not cover {resolved.name}")
    checkpointing = options.gradient_checkpointing
    least = min(rows, key=lambda row: need(row, checkpointing))
    smaller = need(least, checkpointing) < need(own, checkpointing)
    sizes = {flag: need(own, flag) for flag in (False, True)}
    return sizes, {least.config: need(least, checkpointing)} if smaller else {}
