"""Private names of DeepSpeed for state that it swaps to NVMe, each behind a function with a plain name.

They are `deepspeed_compat`'s for configs with NVMe only; `check_supported` looks for all of them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from types import SimpleNamespace, TracebackType
from typing import Any

import torch

from qa_deepspeed.engine import deepspeed_compat as compat
from qa_deepspeed.utils.supported import require_names

NAMES = {
    "deepspeed.runtime.engine:DeepSpeedEngine": "zero_nvme_offload_optimizer",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3": """
        optimizer_swapper params_in_nvme_and_cpu _prepare_sub_group _release_sub_group
        _reassign_or_swap_out_partitioned_parameters
    """,
    "deepspeed.runtime.swap_tensor.optimizer_utils:OptimizerSwapper": "swap_params_info",
    "deepspeed.runtime.swap_tensor.optimizer_utils:SwapTensorContext": "compute_tensor swap_path",
    "deepspeed.runtime.swap_tensor.partitioned_param_swapper": "PartitionedParamStatus",
    "deepspeed.runtime.swap_tensor.partitioned_param_swapper:AsyncPartitionedParameterSwapper": """
        invalid_buffer get_path swap_in
    """,
    "deepspeed.runtime.zero.partition_parameters:Init": "nvme_swapper ds_tensor",
    "deepspeed.ops.op_builder": "AsyncIOBuilder",
    "deepspeed.runtime.swap_tensor.partitioned_optimizer_swapper": "AsyncIOBuilder",
}
"""Module or "module:class" -> names in it."""

SWAP_MODULES = "deepspeed.runtime.swap_tensor"
"""The package of the swappers, which assert that they have buffers."""


@functools.cache
def check_supported() -> None:
    """Check once in a process that all of these names are there.

    Raises:
        UserError: one is missing.
    """
    require_names("deepspeed", {place: names.split() for place, names in NAMES.items()})


def swaps(optimizer: Any) -> bool:
    """Stage 3: whether optimizer state or parameters may be on NVMe."""
    return compat.keeps_state_on_nvme(optimizer) or bool(getattr(optimizer, "params_in_nvme_and_cpu", False))


def save_state_in_shards(engine: Any) -> None:
    """Keep an engine from copying swap files beside the shards of a checkpoint; `state_readable` puts their contents
    into the shards.

    With those copies DeepSpeed 0.19.8 does not load the optimizer's shards at all: the count of Adam's steps, the loss
    scale, and sub-groups below 1 MiB, which stay in memory, are lost.
    """
    engine.zero_nvme_offload_optimizer = lambda: False


@contextlib.contextmanager
def state_readable(engine: Any) -> Iterator[None]:
    """Inside, what is swapped out can be read: tensors are mapped from their swap files, of which only what is used is
    read, and then not kept. Collective."""
    optimizer = engine.optimizer
    if not swaps(optimizer):
        yield
        return
    optimizer.checkpoint_event_prologue()  # partitions are on NVMe once no full parameter is in memory
    swapped = _swapped_state(optimizer)
    for tensor, contents in swapped:
        tensor.data = contents
    try:
        with partitions_readable(engine.module.parameters()):
            yield
    finally:
        for tensor, contents in swapped:
            tensor.data = torch.empty(0, dtype=contents.dtype)


def _swapped_state(optimizer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Float32 weights and moments of this rank that are on NVMe, each with the mapped contents of its swap file."""
    if not compat.keeps_state_on_nvme(optimizer):
        return []
    return [
        (one.compute_tensor, _mapped(one.swap_path, group.numel(), group.dtype()))
        for group in optimizer.optimizer_swapper.swap_params_info.values()
        for one in group.tensors
    ]


@contextlib.contextmanager
def partitions_readable(parameters: Iterable[Any]) -> Iterator[None]:
    """Inside, partitions of parameters that are on NVMe are mapped from their swap files."""
    swapped = [parameter for parameter in parameters if _is_swapped_out(parameter)]
    for parameter in swapped:
        swapper, partition = parameter.nvme_swapper, parameter.ds_tensor  # which has another type while it is empty
        partition.data = _mapped(swapper.get_path(parameter, True), int(partition.ds_numel), swapper.dtype)
    try:
        yield
    finally:
        for parameter in swapped:
            if _is_swapped_out(parameter):
                parameter.ds_tensor.data = parameter.nvme_swapper.invalid_buffer.data


def _is_swapped_out(parameter: Any) -> bool:
    if getattr(parameter, "nvme_swapper", None) is None:
        return False
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

    return bool(parameter.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE)


def _mapped(path: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_file(path, shared=False, size=numel, dtype=dtype)


@contextlib.contextmanager
def swap_files_by(handle: type) -> Iterator[None]:
    """Inside, DeepSpeed's swappers read and write by objects of this class, which has the methods of `aio_handle`."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    original = AsyncIOBuilder.load
    AsyncIOBuilder.load = lambda builder, verbose=False: SimpleNamespace(aio_handle=handle)
    try:
        yield
    finally:
        AsyncIOBuilder.load = original


@contextlib.contextmanager
def parameters_read_once() -> Iterator[None]:
    """Inside, DeepSpeed reads a parameter from NVMe once where its prefetching asks for it twice, for the forward and
    the backward pass of the last layers: an assertion of 0.19.8 fails there."""
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper

    original = AsyncPartitionedParameterSwapper.swap_in

    def swap_in(swapper: Any, params: list[Any], *arguments: Any, **named: Any) -> None:
        original(swapper, list(dict.fromkeys(params)), *arguments, **named)

    AsyncPartitionedParameterSwapper.swap_in = swap_in
    try:
        yield
    finally:
        AsyncPartitionedParameterSwapper.swap_in = original


@contextlib.contextmanager
def sub_group_in_memory(optimizer: Any, number: int) -> Iterator[None]:
    """Inside, a sub-group's flat float32 tensor is in memory; then the parameters' partitions get its values, and it is
    swapped out with its optimizer state."""
    timers: set[str] = set()
    swapped = compat.keeps_state_on_nvme(optimizer)
    if swapped:
        optimizer._prepare_sub_group(number, timers)
    yield
    optimizer._reassign_or_swap_out_partitioned_parameters(number)
    if swapped:
        optimizer._release_sub_group(number, timers)


def is_lack_of_buffers(error: BaseException) -> bool:
    """Whether DeepSpeed raised this since a buffer for swap files is too small, or there are too few."""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = last.tb_frame.f_globals.get("__name__", "") if last is not None else ""
    return isinstance(error, AssertionError) and where.startswith(SWAP_MODULES)
