"""Which shipped DeepSpeed config a model needs: memory and traffic under every one on given machines, and the choice.

`qa-deepspeed plan` prints it, a run with `--deepspeed_config auto` takes it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from qa_deepspeed.config.batch_plan import longest_rows_at_once
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import ds_config
from qa_deepspeed.engine.config_check import AUTO
from qa_deepspeed.engine.cuda_graphs import uses_graphs
from qa_deepspeed.engine.device import bf16_supported
from qa_deepspeed.engine.ds_config import ResolvedConfig
from qa_deepspeed.engine.memory import (
    MemoryEstimate,
    ZeroSettings,
    countable,
    estimate_cpu_memory,
    estimate_memory,
    free_host_memory,
)
from qa_deepspeed.models.footprint import Footprint, footprint
from qa_deepspeed.models.lora import LoraSettings, check_lora
from qa_deepspeed.models.packing import packs_by_name
from qa_deepspeed.utils.dtypes import weight_dtype
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.units import GIB, gib

USABLE_SHARE = 0.95
"""Of a device's memory: the allocator cannot use every byte of it, since blocks of different sizes leave gaps."""


HALF_HOST_WORK = {1: 0, 2: 1, 0: 2, 3: 3}
"""ZeRO stages by the host's work in a step in half precision, least first: the update takes 1,141 operators at stages 1
and 2, 3,417 at stage 0 (tests/bench/bench_host.py). In float32 stage 0 takes least."""


@dataclass(frozen=True)
class Machines:
    """Nodes of one kind; memory in bytes, gpu_memory of one GPU, cpu_memory of one node. No gpu_memory: CPU ranks."""

    nodes: int
    ranks_per_node: int
    gpu_memory: int | None
    cpu_memory: int

    @property
    def ranks(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Row:
    """What came out for one config. `fits` with every activation kept, `fits_checkpointed` with checkpointing;
    `host_work` orders stages by the work of the host in a step."""

    config: str
    stage: int
    host_work: int
    need: MemoryEstimate
    fits: bool
    fits_checkpointed: bool
    lacks: str


def estimate_configs(
    run_options: RunOptions, model_config: Any, machines: Machines, bf16: bool = True
) -> tuple[Footprint, list[Row]]:
    """The model's footprint and one row for each shipped config that can be counted, and for the run's own.

    Raises:
        UserError: a config and the options disagree, or the model cannot be measured, or not have such adapters.
    """
    check_lora(run_options)
    lora = LoraSettings.of(run_options.to_dict())
    on_cpu = machines.gpu_memory is None
    names = [name for name in ds_config.shipped() if countable(ds_config.load(name))]
    own = run_options.deepspeed_config
    if own not in (None, AUTO) and own.removesuffix(".json") not in names:
        names.append(own)
    rows, model, packed = [], None, packs_by_name(run_options, model_config)
    for name in names:
        resolved = ds_config.resolve(
            dataclasses.replace(run_options, deepspeed_config=name),
            machines.ranks,
            "cpu" if on_cpu else "cuda",
            bf16,
        )
        try:
            ds_config.check_trainable(resolved)
        except UserError:  # such a config is no choice
            continue
        element = weight_dtype(resolved.precision).itemsize
        if model is None:
            kind = torch.bfloat16 if element == 2 else torch.float32
            rows_at_once = longest_rows_at_once(run_options, resolved.plan)
            model = footprint(model_config, rows_at_once, run_options.max_seq_length, kind, lora, run_options.freeze)
        width = ds_config.hidden_size(model_config)
        zero = ZeroSettings.of(ds_config.finish(resolved, 1, width, machines.ranks_per_node))
        arguments = (model, zero, machines.ranks, element, resolved.plan.gradient_accumulation_steps)
        if on_cpu:
            needed = estimate_cpu_memory(*arguments)
        else:
            needed = estimate_memory(*arguments, uses_graphs(resolved, "cuda", packed, machines.ranks))
        host_work = HALF_HOST_WORK[zero.stage] if element == 2 else zero.stage
        rows.append(_row(name, zero.stage, host_work, needed, machines))
    assert model is not None, "there are shipped configs"
    return model, rows


def _row(name: str, stage: int, host_work: int, needed: MemoryEstimate, machines: Machines) -> Row:
    host = needed.host_of(machines.ranks_per_node)
    lacks = []
    if machines.gpu_memory is not None:
        room = int(USABLE_SHARE * machines.gpu_memory)
        fits, checkpointed = needed.device() <= room, needed.device(checkpointing=True) <= room
        if not checkpointed:
            lacks.append(f"{(needed.device(checkpointing=True) - room) / GIB:.0f} GiB a GPU")
    else:
        fits = checkpointed = True
    if host > USABLE_SHARE * machines.cpu_memory:
        fits = checkpointed = False
        lacks.append(f"{(host - USABLE_SHARE * machines.cpu_memory) / GIB:.0f} GiB of host memory a node")
    return Row(name, stage, host_work, needed, fits, checkpointed, " and ".join(lacks))


def recommend(rows: list[Row], checkpointed: bool = False) -> tuple[Row | None, str]:
    """The config to take, or None, and why: the fastest among those that fit as they are, else among those that fit
    with gradient checkpointing; with `checkpointed` only the latter count.

    Fastest is what uses no host memory, then what is not stage 3 (whose layers wait for their parameters each time),
    then what sends least, then what costs the host least.
    """
    for checkpointing in (True,) if checkpointed else (False, True):
        fitting = [row for row in rows if (row.fits_checkpointed if checkpointing else row.fits)]
        if fitting:
            best = min(fitting, key=lambda row: (row.need.bus, row.stage == 3, row.need.sent, row.host_work))
            others = [row.config for row in rows if row not in fitting]
            why = f"take {best.config}: the fastest that fits"
            why += " with --gradient_checkpointing" if checkpointing else ""
            why += f", {gib(best.need.sent)} GiB a step over the network"
            why += f" and {gib(best.need.bus)} GiB to and from the host" if best.need.bus else ""
            why += f"; {', '.join(others)} {'does' if len(others) == 1 else 'do'} not fit" if others else ""
            return best, why
    least = min(rows, key=lambda row: row.need.device(checkpointing=True))
    return None, (
        f"none fits: {least.config} needs least on a device and lacks {least.lacks}; take more GPUs, "
        "or a smaller per_gpu_train_batch_size or max_seq_length"
    )


def choose_config(
    resolved: ResolvedConfig, model_config: Any, device: torch.device, ranks: int, ranks_here: int
) -> tuple[str, str]:
    """The shipped config to take for a run that names none, and why, in words.

    Counts with this device's free memory and this host's. Where no config fits by the memory plan, the one that
    `resolved` has stays.

    Args:
        ranks, ranks_here: of the run, and those on this host.
    """
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    machines = Machines(-(-ranks // ranks_here), ranks_here, on_device, free_host_memory())
    _, rows = estimate_configs(resolved.options, model_config, machines, bf16_supported(device))
    best, why = recommend(rows, resolved.options.gradient_checkpointing)
    return (best.config if best else resolved.name), why
