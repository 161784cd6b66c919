"""Carry weights and optimizer state into an engine of another ZeRO stage, number of ranks or precision.

Every rank takes its own share of each parameter from the shards of the checkpoint; nothing is converted on the disk and
nothing travels between ranks.
"""

from __future__ import annotations

from typing import Any

import torch

from qa_deepspeed.engine.shards import WEIGHT, Shards
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError


def carry_over(engine: Any, shards: Shards) -> None:
    """Fill a fresh DeepSpeed engine: float32 weights, the model's own copy of them, optimizer state, counters.

    Raises:
        UserError: the checkpoint is of another model, or DeepSpeed's optimizer wrapper is one that is not known here.
    """
    names = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    if names != set(shards.names):
        raise UserError(
            f"the checkpoint trains {len(shards.names)} parameters, this run {len(names)}, and not the "
            f"same ones ({', '.join(sorted(names ^ set(shards.names))[:3])} ...)"
        )
    stage = engine.zero_optimization_stage()
    {0: _fill_whole, 1: _fill_slices, 2: _fill_slices, 3: _fill_partitions}[stage](engine, shards)
    engine.global_steps = shards.common["global_steps"]
    engine.global_samples = shards.common["global_samples"]
    engine.skipped_steps = shards.common["skipped_steps"]
    if engine.lr_scheduler is not None and shards.common["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(shards.common["lr_scheduler"])


def _state_of(shards: Shards, device: torch.device, filled: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An optimizer's state of one (flat) parameter."""
    return {"step": torch.tensor(shards.optimizer_step, device=device)} | filled


def _fill_whole(engine: Any, shards: Shards) -> None:
    """Stage 0: torch's optimizer on the parameters themselves, or on float32 copies of them."""
    outer = engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    masters: dict[torch.Tensor, torch.Tensor] = {}
    if inner is not outer:
        groups = getattr(outer, "fp32_groups", None)
        if groups is None:
            raise UserError(
                f"a checkpoint of another kind cannot be carried into DeepSpeed's {type(outer).__name__}: "
                "go on with --deepspeed_config zero1"
            )
        for parameters, copies in zip(outer.fp16_groups, groups, strict=True):
            masters |= zip(parameters, copies, strict=True)
    for parameter, name in engine.param_names.items():
        if not parameter.requires_grad:
            continue
        found = {key: value.view(parameter.shape) for key, value in shards.read(name).items()}
        master = masters.get(parameter, parameter)
        weight = found.pop(WEIGHT)
        master.data.copy_(weight)
        parameter.data.copy_(weight)
        moments = {key: value.to(master.device).clone() for key, value in found.items()}
        inner.state[master] = _state_of(shards, master.device, moments)


def _fill_slices(engine: Any, shards: Shards) -> None:
    """Stages 1 and 2: this rank's flat partition of each group, where DeepSpeed links the parameters to it."""
    optimizer = engine.optimizer
    for flat, parameters in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        moments: dict[str, torch.Tensor] = {}
        for parameter in parameters:
            link = parameter._hp_mapping
            if link is None:  # all of it belongs to other ranks
                continue
            here, there = link.get_hp_fragment_address(), link.lp_fragment_address
            for key, value in shards.read(engine.param_names[parameter]).items():
                target = flat.data if key == WEIGHT else moments.setdefault(key, torch.zeros_like(flat.data))
                target.narrow(0, here.start, here.numel).copy_(value.narrow(0, there.start, there.numel))
        optimizer.optimizer.state[flat] = _state_of(shards, flat.device, moments)
    optimizer.update_lp_params()


def _fill_partitions(engine: Any, shards: Shards) -> None:
    """Stage 3: this rank's share of each parameter, one after another in the flat tensor of each sub-group."""
    optimizer = engine.optimizer
    if getattr(optimizer, "swap_optimizer", False):
        raise UserError(
            "a checkpoint of another kind cannot be carried into optimizer state on NVMe: go on with "
            "--deepspeed_config zero3_offload"
        )
    optimizer.checkpoint_event_prologue()  # every parameter is partitioned now
    for place, parameters in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[place]
        moments: dict[str, torch.Tensor] = {}
        start = 0
        for parameter in parameters:
            share = parameter.partition_numel()
            begin = min(dist.rank() * share, parameter.ds_numel)
            real = min(share, parameter.ds_numel - begin)  # the rest is padding
            for key, value in shards.read(engine.param_names[parameter]).items():
                target = flat.data if key == WEIGHT else moments.setdefault(key, torch.zeros_like(flat.data))
                target.narrow(0, start, real).copy_(value.narrow(0, begin, real))
            start += share
        optimizer.optimizer.state[flat] = _state_of(shards, flat.device, moments)
        optimizer.fp16_partitioned_groups_flat[place].data.copy_(flat.data)
        updated = optimizer.unflatten(
            optimizer.fp16_partitioned_groups_flat[place], optimizer.fp16_partitioned_groups[place]
        )
        for partition, value in zip(optimizer.fp16_partitioned_groups[place], updated, strict=True):
            partition.data = value.data
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    optimizer.checkpoint_event_epilogue()
