"""A checkpoint's parameters, whole and one at a time, out of the shards of any ZeRO stage and number of ranks.

Files are mapped into memory, not read: what is not asked for costs nothing, whatever the size of the model. The layout
of the shards is DeepSpeed's (its checkpoint/ds_to_universal.py and utils/zero_to_fp32.py read the same).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.progress import ProgressBar

WEIGHT = "weight"
"""Name of a parameter's float32 value beside those of its optimizer state, like `exp_avg`."""


@dataclass(frozen=True)
class _Piece:
    """Where a stretch of a flattened parameter lies: in each of these flat tensors from `start` on."""

    tensors: dict[str, torch.Tensor]
    start: int
    count: int


class Shards:
    """The parameters of the checkpoint folder `checkpoint`, which was written at ZeRO stage `stage` by `ranks` ranks.

    `optimized` names the parameters in the order of the optimizer's groups, which stage 0 does not write down.

    Raises:
        UserError: shards are not on this disk.
    """

    def __init__(self, checkpoint: Path, stage: int, ranks: int, optimized: list[str]) -> None:
        require_shards(checkpoint, stage, range(ranks))
        part = "zero_pp_rank_0_" if stage == 3 else ""
        self.common: dict[str, Any] = _mapped(checkpoint / f"{part}mp_rank_00_model_states.pt")
        self._ranks = ranks
        self._checkpoint = checkpoint
        self._stage = stage
        self._pieces: dict[str, list[_Piece]] = {}
        self.optimizer_step = 0.0
        """Updates the optimizer has made."""
        if stage == 0:
            self._index_whole(optimized)
            return
        for rank in range(ranks):
            (path,) = checkpoint.glob(f"*{_optimizer_file(rank)}")
            states = _mapped(path)["optimizer_state_dict"]
            self._index_partition(states) if stage == 3 else self._index_slices(states)

    @property
    def names(self) -> list[str]:
        """The parameters that are trained."""
        return list(self._pieces)

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """A trained parameter's `WEIGHT` and optimizer state, each float32 and flat `[numbers]`."""
        pieces = self._pieces[name]
        return {
            key: torch.cat([piece.tensors[key].narrow(0, piece.start, piece.count) for piece in pieces]).float()
            for key in pieces[0].tensors
        }

    def weights(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The model's state dict, floating-point entries in `dtype`; entries that share a tensor go on sharing it."""
        shapes = self._shapes() if self._stage == 3 else {}
        aliases = self.common["shared_params"] or {}
        frozen = self._frozen() if self._stage == 3 else {}
        found: dict[str, torch.Tensor] = {}
        result: dict[str, torch.Tensor] = {}
        module = self.common["module"]
        with ProgressBar("putting weights together", len(module), "tensor", shown=dist.is_rank_zero()) as bar:
            for name, stored in module.items():
                source = aliases.get(name, name)
                if source not in found:
                    if source in self._pieces:
                        value = self.read(source)[WEIGHT].reshape(shapes.get(source, stored.shape))
                    else:
                        value = frozen.get(source, stored)
                    found[source] = (value.to(dtype) if value.is_floating_point() else value).clone()
                result[name] = found[source]
                bar.advance()
        return result

    def _index_whole(self, optimized: list[str]) -> None:
        saved = self.common["optimizer"]
        masters = [tensor for group in saved.get("fp32_groups", []) for tensor in group]  # none in float32
        states = saved.get("optimizer_state_dict", saved)["state"]
        for place, name in enumerate(optimized):
            weight = masters[place] if masters else self.common["module"][name]
            state = states.get(place, {})
            self.optimizer_step = float(state.get("step", 0))
            tensors = {WEIGHT: weight, **{key: value for key, value in state.items() if _like(value, weight)}}
            flat = {key: value.reshape(-1) for key, value in tensors.items()}
            self._pieces[name] = [_Piece(flat, 0, weight.numel())]

    def _index_slices(self, states: dict[str, Any]) -> None:
        """Stages 1 and 2: each group is one flat tensor, cut evenly over the ranks wherever that falls."""
        saved = states["base_optimizer_state"]
        saved = saved["state"] if isinstance(saved, dict) else saved
        for group, flat in enumerate(states["single_partition_of_fp32_groups"]):
            tensors = self._tensors(flat, saved[group])
            for name, place in states["param_slice_mappings"][group].items():
                self._pieces.setdefault(name, []).append(_Piece(tensors, place.start, place.numel))

    def _index_partition(self, states: dict[str, Any]) -> None:
        """Stage 3: each parameter is cut evenly over the ranks, the last parts padded."""
        for group, shapes in enumerate(self.common["param_shapes"]):
            tensors = self._tensors(states["fp32_flat_groups"][group], states["optimizer_state_dict"]["state"][group])
            start = 0
            for name, shape in shapes.items():
                share = -(-prod(shape) // self._ranks)
                known = self._pieces.setdefault(name, [])
                real = min(share, prod(shape) - share * len(known))
                if real > 0:
                    known.append(_Piece(tensors, start, real))
                start += share

    def _tensors(self, flat: torch.Tensor, state: dict[str, Any]) -> dict[str, torch.Tensor]:
        self.optimizer_step = float(state.get("step", 0))
        # At stages 1 and 2 the weights are saved without the padding at the end that the state may have.
        return {WEIGHT: flat, **{key: value for key, value in state.items() if torch.is_tensor(value) and value.ndim}}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(shape) for group in self.common["param_shapes"] for name, shape in group.items()}

    def _frozen(self) -> dict[str, torch.Tensor]:
        """Stage 3: parameters that are not trained are cut over the model states' files."""
        shapes = self.common["frozen_param_shapes"] or {}
        files = (
            [
                _mapped(self._checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")["frozen_param_fragments"]
                for rank in range(self._ranks)
            ]
            if shapes
            else []
        )
        return {
            name: torch.cat([fragments[name].reshape(-1) for fragments in files])[: prod(shape)].reshape(tuple(shape))
            for name, shape in shapes.items()
        }


def require_shards(checkpoint: Path, stage: int, ranks: Iterable[int]) -> None:
    """Where nodes have disks of their own, each disk has the shards of its node's ranks.

    Raises:
        UserError: `checkpoint` has not those of all these `ranks` here.
    """
    lacking = [rank for rank in ranks if stage > 0 and not list(checkpoint.glob(f"*{_optimizer_file(rank)}"))]
    if lacking:
        ranks_there = ", ".join(map(str, lacking))
        raise UserError(
            f"{checkpoint} has no shards of rank {ranks_there} on this disk, another node's has them: go on with the "
            "same hosts in the same order, or put the checkpoint's files of all nodes together on each"
        )


def _optimizer_file(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


@contextlib.contextmanager
def plain_values_only() -> Iterator[None]:
    """Inside, torch.load reads tensors, plain values and a few of DeepSpeed's classes, whatever it is passed."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _mapped(path: Path) -> dict[str, Any]:
    with plain_values_only():
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _like(value: Any, weight: torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == weight.shape
