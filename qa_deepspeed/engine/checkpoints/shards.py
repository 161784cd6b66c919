"""A checkpoint's full parameters, one at a time, from the shards of any ZeRO stage and number of ranks; and an engine
filled from them that has another number of ranks, stage or precision.

Files are mapped into memory, not read: parts that are not used cost nothing, whatever the model's size. Nothing is
converted on the disk and nothing is sent between ranks: each rank copies its partitions from the files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch

from qa_deepspeed.engine import deepspeed_compat as compat
from qa_deepspeed.engine.checkpoints.loss_scale import carry_loss_scale, saved_loss_scaler
from qa_deepspeed.engine.nvme import nvme_compat
from qa_deepspeed.models.flat_parameters import FlatNames, flat_names
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.progress import ProgressBar

WEIGHT = "weight"
"""Key of a parameter's float32 value beside those of its optimizer state, such as `exp_avg`."""


@dataclass(frozen=True)
class _Piece:
    """A slice of a flattened parameter: `count` elements from `start` in each of these flat tensors."""

    tensors: dict[str, torch.Tensor]
    start: int
    count: int


class Shards:
    """The parameters of the checkpoint folder `checkpoint`, which was written at ZeRO stage `stage` by `ranks` ranks.

    `optimized` lists the parameters in the order of the optimizer's groups, which stage 0 does not save. `flat` has the
    tensors of flat parameters, each of which is then a parameter here.

    Raises:
        UserError: shards are missing on this disk.
    """

    def __init__(
        self, checkpoint: Path, stage: int, ranks: int, optimized: list[str], flat: FlatNames | None = None
    ) -> None:
        require_shards(checkpoint, stage, range(ranks))
        self.common = compat.read_common_state(checkpoint, stage)
        self._ranks = ranks
        self._checkpoint = checkpoint
        self._stage = stage
        self._pieces: dict[str, list[_Piece]] = {}
        self.optimizer_step = 0.0
        """Number of updates that the optimizer has made."""
        self.scaler: Any = None
        """DeepSpeed's scaler of the loss, the same on all ranks; None at stage 0."""
        if stage == 0:
            self._index_whole(optimized, flat or {})
        for rank in range(ranks if stage else 0):
            (path,) = checkpoint.glob(compat.optimizer_files(rank))
            saved = compat.read_checkpoint_file(path)
            self.scaler = saved_loss_scaler(saved)
            self._index_partitions(saved) if stage == 3 else self._index_slices(saved)
        for name, tensors in (flat or {}).items():
            self._cut(name, tensors)

    @property
    def names(self) -> list[str]:
        """Names of the trained parameters."""
        return list(self._pieces)

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """A trained parameter's `WEIGHT` and optimizer state, each float32 and flat `[numbers]`."""
        pieces = self._pieces[name]
        return {
            key: torch.cat([piece.tensors[key].narrow(0, piece.start, piece.count) for piece in pieces]).float()
            for key in pieces[0].tensors
        }

    def weights(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The model's state dict, floating-point entries in `dtype`; entries that share a tensor still do."""
        shapes = self._shapes() if self._stage == 3 else {}
        frozen = self._frozen() if self._stage == 3 else {}
        found: dict[str, torch.Tensor] = {}
        result: dict[str, torch.Tensor] = {}
        module = self.common.module
        with ProgressBar("assembling weights", len(module), "tensor", shown=dist.is_rank_zero()) as bar:
            for name, stored in module.items():
                source = self.common.aliases.get(name, name)
                if source not in found:
                    if source in self._pieces:
                        value = self.read(source)[WEIGHT].reshape(shapes.get(source, stored.shape))
                    else:
                        value = frozen.get(source, stored)
                    found[source] = (value.to(dtype) if value.is_floating_point() else value).clone()
                result[name] = found[source]
                bar.advance()
        return result

    def _cut(self, flat: str, tensors: dict[str, list[int]]) -> None:
        """Replace the pieces of a flat parameter by those of the tensors in it."""
        pieces = self._pieces.pop(flat)
        begins = [0, *accumulate(piece.count for piece in pieces)]
        begin = 0
        for name, shape in tensors.items():
            end = begin + prod(shape)
            parts = []
            for piece, first in zip(pieces, begins, strict=False):
                low, high = max(begin, first), min(end, first + piece.count)
                if low < high:
                    parts.append(_Piece(piece.tensors, piece.start + low - first, high - low))
            self._pieces[name], begin = parts, end

    def _index_whole(self, optimized: list[str], flat: FlatNames) -> None:
        masters = self.common.masters
        module = self.common.module
        for place, name in enumerate(optimized):
            if masters:
                weight = masters[place]
            elif name in flat:
                weight = torch.cat([module[one].reshape(-1) for one in flat[name]])
            else:
                weight = module[name]
            state = self.common.optimizer.get(place, {})
            self.optimizer_step = float(state.get("step", 0))
            tensors = {WEIGHT: weight, **{key: value for key, value in state.items() if _like(value, weight)}}
            lines = {key: value.reshape(-1) for key, value in tensors.items()}
            self._pieces[name] = [_Piece(lines, 0, weight.numel())]

    def _index_slices(self, saved: dict[str, Any]) -> None:
        """Stages 1 and 2: each group is one flat tensor, split evenly over the ranks wherever that falls."""
        for flat, state, places in compat.saved_slices(saved):
            tensors = self._tensors(flat, state)
            for name, (start, count) in places.items():
                self._pieces.setdefault(name, []).append(_Piece(tensors, start, count))

    def _index_partitions(self, saved: dict[str, Any]) -> None:
        """Stage 3: each parameter is split evenly over the ranks, the last parts padded."""
        partitions = _saved_partitions(self._checkpoint, saved)
        for shapes, (flat, state) in zip(self.common.trained_shapes, partitions, strict=True):
            tensors = self._tensors(flat, state)
            start = 0
            for name, shape in shapes.items():
                size = -(-prod(shape) // self._ranks)
                known = self._pieces.setdefault(name, [])
                real = min(size, prod(shape) - size * len(known))
                if real > 0:
                    known.append(_Piece(tensors, start, real))
                start += size

    def _tensors(self, flat: torch.Tensor, state: dict[str, Any]) -> dict[str, torch.Tensor]:
        self.optimizer_step = float(state.get("step", 0))
        # At stages 1 and 2 weights are saved without padding at the end, states may have one.
        return {WEIGHT: flat, **{key: value for key, value in state.items() if torch.is_tensor(value) and value.ndim}}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(shape) for group in self.common.trained_shapes for name, shape in group.items()}

    def _frozen(self) -> dict[str, torch.Tensor]:
        """Stage 3: parameters that are not trained are split over the model files of the ranks."""
        shapes = self.common.frozen_shapes
        if not shapes:
            return {}
        files = [compat.read_common_state(self._checkpoint, 3, rank).frozen_partitions for rank in range(self._ranks)]
        return {
            name: torch.cat([partitions[name].reshape(-1) for partitions in files])[: prod(shape)].reshape(tuple(shape))
            for name, shape in shapes.items()
        }


def require_shards(checkpoint: Path, stage: int, ranks: Iterable[int]) -> None:
    """Check that the shards of `ranks` are on this disk: node-local disks have those of their node's ranks.

    Raises:
        UserError: shards are missing.
    """
    missing = [rank for rank in ranks if stage > 0 and not list(checkpoint.glob(compat.optimizer_files(rank)))]
    if missing:
        ranks_there = ", ".join(map(str, missing))
        raise UserError(
            f"{checkpoint} has no shards of rank {ranks_there} on this disk, another node has them: resume with the "
            "same hosts in the same order, or copy the checkpoint's files of all nodes to each node"
        )


def _saved_partitions(checkpoint: Path, shard: dict[str, Any]) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    found = compat.saved_partitions(shard)
    if not all(flat.numel() for flat, _ in found):
        raise UserError(
            f"{checkpoint} has optimizer state in copies of swap files (offloaded_tensors), as zero3_nvme saved it in "
            "version 0.1: resume it with that version, or train again"
        )
    return found


def _like(value: Any, weight: torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == weight.shape


def fill_engine(engine: Any, shards: Shards) -> None:
    """Fill a new DeepSpeed engine: float32 weights, the model's copy of them, optimizer state, loss scale,
    counters.

    Raises:
        UserError: the checkpoint is of another model, or DeepSpeed's optimizer wrapper is not supported.
    """
    flat = flat_names(engine.module)
    names = {
        one
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
        for one in flat.get(name, [name])
    }
    if names != set(shards.names):
        raise UserError(
            f"the checkpoint trains {len(shards.names)} parameters, this run {len(names)}, and not the "
            f"same ones ({', '.join(sorted(names ^ set(shards.names))[:3])} ...)"
        )
    stage = engine.zero_optimization_stage()
    {0: _fill_full, 1: _fill_slices, 2: _fill_slices, 3: _fill_partitions}[stage](engine, shards)
    _set_progress(engine, shards.common, shards.scaler)


def load_own_shard(engine: Any, checkpoint: Path) -> compat.CommonState | None:
    """Fill a new engine whose state is on NVMe from this rank's shard of a checkpoint of as many ranks; returns the
    non-partitioned state, or None if its sub-groups are others. Collective.

    DeepSpeed's own way expects copies of the swap files in the checkpoint, see `nvme_compat.save_state_in_shards`.
    """
    optimizer, names = engine.optimizer, compat.parameter_names(engine)
    common = compat.read_common_state(checkpoint, 3, dist.rank())
    flats = compat.partitions(optimizer, dist.rank())
    groups = [[names[part.parameter] for part in parts] for _, parts in flats]
    if groups != [list(shapes) for shapes in common.trained_shapes]:
        return None
    (path,) = checkpoint.glob(compat.optimizer_files(dist.rank()))
    saved = compat.read_checkpoint_file(path)
    partitions = _saved_partitions(checkpoint, saved)
    with compat.all_partitioned(optimizer):
        for number, (weights, state) in enumerate(partitions):
            flat, _ = flats[number]
            with nvme_compat.sub_group_in_memory(optimizer, number):
                flat.data.copy_(weights)
                optimizer.optimizer.state[flat] = copy.deepcopy(state)  # mapped from the file
    _set_progress(engine, common, saved_loss_scaler(saved))
    return common


def _set_progress(engine: Any, common: compat.CommonState, scaler: Any) -> None:
    carry_loss_scale(engine.optimizer, scaler)
    compat.set_counters(engine, common.steps, common.samples, common.skipped)
    if engine.lr_scheduler is not None and common.schedule is not None:
        engine.lr_scheduler.load_state_dict(common.schedule)


def _fill_full(engine: Any, shards: Shards) -> None:
    """Stage 0: torch's optimizer on the parameters themselves, or on float32 copies of them."""
    outer = engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    masters = compat.master_weights(outer) if inner is not outer else {}
    if masters is None:
        raise UserError(
            f"a checkpoint of another kind cannot be loaded into DeepSpeed's {type(outer).__name__}: "
            "resume with --deepspeed_config zero1"
        )
    flat = flat_names(engine.module)
    for parameter, name in compat.parameter_names(engine).items():
        if not parameter.requires_grad:
            continue
        found = {key: value.view(parameter.shape) for key, value in _read(shards, name, flat).items()}
        master = masters.get(parameter, parameter)
        weight = found.pop(WEIGHT)
        master.data.copy_(weight)
        parameter.data.copy_(weight)
        moments = {key: value.to(master.device).clone() for key, value in found.items()}
        inner.state[master] = _state_of(shards, master.device, moments)


def _fill_slices(engine: Any, shards: Shards) -> None:
    """Stages 1 and 2: this rank's flat partition of each group, with slices of parameters in it."""
    _fill_flats(engine, shards, compat.slices(engine.optimizer))
    compat.publish_slices(engine.optimizer)


def _fill_partitions(engine: Any, shards: Shards) -> None:
    """Stage 3: this rank's partition of each parameter, one after another in the flat tensor of each sub-group."""
    optimizer = engine.optimizer
    with compat.all_partitioned(optimizer):
        flats = compat.partitions(optimizer, dist.rank())
        if nvme_compat.swaps(optimizer):
            for number, one in enumerate(flats):
                with nvme_compat.sub_group_in_memory(optimizer, number):
                    _fill_flats(engine, shards, [one])
            return
        _fill_flats(engine, shards, flats)
        compat.publish_partitions(optimizer)


def _fill_flats(engine: Any, shards: Shards, flats: list[tuple[torch.Tensor, list[compat.Slice]]]) -> None:
    """Copy weights and optimizer state into flat tensors, by the places of the parameters in them."""
    names, tensors = compat.parameter_names(engine), flat_names(engine.module)
    keys = shards.read(next(iter(shards.names))).keys() - {WEIGHT}
    for flat, parts in flats:
        moments = {key: torch.zeros_like(flat.data) for key in keys}  # a small group's may be padding alone
        for part in parts:
            for key, value in _read(shards, names[part.parameter], tensors).items():
                target = flat.data if key == WEIGHT else moments[key]
                target.narrow(0, part.target, part.count).copy_(value.narrow(0, part.source, part.count))
        engine.optimizer.optimizer.state[flat] = _state_of(shards, flat.device, moments)


def _read(shards: Shards, name: str, flat: FlatNames) -> dict[str, torch.Tensor]:
    """`Shards.read` of a parameter of the engine, which may be a flat one."""
    found = [shards.read(one) for one in flat.get(name, [name])]
    return {key: torch.cat([one[key] for one in found]) for key in found[0]}


def _state_of(shards: Shards, device: torch.device, moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An optimizer's state of one (flat) parameter."""
    return {"step": torch.tensor(shards.optimizer_step, device=device)} | moments
