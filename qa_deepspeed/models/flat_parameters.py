"""Flat parameters: the tensors of a block (a layer, the embeddings, the head) in one parameter per weight-decay group.

DeepSpeed works on each parameter in Python: hooks, copies, norms and checks. On a GPU the host's part of an optimizer
step grows with their number, not with their size. Before each forward the flat parameters are cut into the tensors that
the modules use, as views, so that autograd gathers a block's gradients by one concatenation. State dicts have the names
and shapes of the tensors: only the optimizer's shards show that parameters are flat.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from qa_deepspeed.models.layers import Layers, layer_lists

DECAYED, NOT_DECAYED = "flat_decayed", "flat_not_decayed"
"""Names of a block's flat parameters: of the tensors with weight decay, and of the others."""

LARGE_TABLE = 2**20
"""Elements of an embedding's weight from which on it stays a parameter of its own: copying its gradient into a flat one
costs more than one parameter does."""

LARGEST = 2**25
"""Elements of a flat parameter at most. In larger blocks arithmetic outweighs the host's work, and DeepSpeed's buckets
(5e7 elements in the shipped configs) should hold several."""

FlatNames = dict[str, dict[str, list[int]]]
"""Name of a flat parameter -> shapes of the tensors in it by their names, in their order."""

DecayRule = Callable[[str, Tensor], bool]
"""Whether a tensor has weight decay, by its name."""


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a flat parameter: its name in the model, and the module that uses it as `attribute`."""

    name: str
    module: nn.Module
    attribute: str
    shape: torch.Size


class _Flattened:
    """The flat parameters of a model; hooks of the model keep it."""

    def __init__(self) -> None:
        self.tensors: dict[str, list[_Tensor]] = {}

    def cut(self, model: nn.Module) -> None:
        """Give the modules their tensors: views of the flat parameters, with a history for autograd."""
        for name, tensors in self.tensors.items():
            for one, view in zip(tensors, _views(model.get_parameter(name), tensors), strict=True):
                one.module.__dict__[one.attribute] = view

    def before_forward(self, model: nn.Module, arguments: Any) -> None:
        self.cut(model)

    def name_tensors(self, model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """After `state_dict`: views under the tensors' own names instead of the flat parameters."""
        for name, tensors in self.tensors.items():
            flat = state.pop(prefix + name)
            state.update(zip((prefix + one.name for one in tensors), _views(flat, tensors), strict=True))

    def join_tensors(self, model: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Before `load_state_dict`: flat parameters instead of the tensors under their own names."""
        for name, tensors in self.tensors.items():
            names = [prefix + one.name for one in tensors]
            if all(one in state for one in names):
                state[prefix + name] = torch.cat([state.pop(one).reshape(-1) for one in names])


def flatten(model: nn.Module, decays: DecayRule) -> None:
    """Make the trained parameters of a model flat, in place.

    A parameter stays as it is if several modules share it, if it would be alone in its flat one or this one larger than
    `LARGEST`, or if it is a `LARGE_TABLE`.
    """
    flattened = _Flattened()
    uses = Counter(id(one) for module in model.modules() for one in module.parameters(recurse=False))
    groups: dict[tuple[str, int, bool, torch.dtype], list[tuple[_Tensor, Tensor]]] = {}
    stacks, layers = layer_lists(model), Layers.of(model)
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            table = isinstance(module, nn.Embedding) and parameter.numel() >= LARGE_TABLE
            if not parameter.requires_grad or uses[id(parameter)] > 1 or table:
                continue
            name = f"{path}.{attribute}" if path else attribute
            block = _block_of(name, model, stacks)
            key = (block, layers.place(name), decays(name, parameter), parameter.dtype)
            groups.setdefault(key, []).append((_Tensor(name, module, attribute, parameter.shape), parameter))
    for (block, _, decayed, _), members in groups.items():
        owner, short = model.get_submodule(block), DECAYED if decayed else NOT_DECAYED
        if len(members) < 2 or sum(one.numel() for _, one in members) > LARGEST or hasattr(owner, short):
            continue
        flat = nn.Parameter(torch.cat([parameter.detach().reshape(-1) for _, parameter in members]))
        for one, _ in members:
            delattr(one.module, one.attribute)
        owner.register_parameter(short, flat)
        flattened.tensors[f"{block}.{short}" if block else short] = [one for one, _ in members]
    flattened.cut(model)
    model.register_forward_pre_hook(flattened.before_forward)
    # torch sets an attribute of the hook, which a method has not
    hook = functools.partial(flattened.name_tensors)
    model.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(flattened.join_tensors)  # type: ignore[no-untyped-call]
    model.__dict__["_flattened"] = flattened


def flat_names(model: nn.Module) -> FlatNames:
    """The flat parameters of a model and the tensors in them; empty if `flatten` was not called."""
    flattened: _Flattened | None = model.__dict__.get("_flattened")
    if flattened is None:
        return {}
    return {name: {one.name: list(one.shape) for one in tensors} for name, tensors in flattened.tensors.items()}


def first_tensor(model: nn.Module, name: str) -> str:
    """The first tensor of a flat parameter of this name; any other name as it is."""
    return next(iter(flat_names(model).get(name, [name])))


def _views(flat: Tensor, tensors: list[_Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [prod(one.shape) for one in tensors])
    return [part.view(one.shape) for part, one in zip(parts, tensors, strict=True)]


def _block_of(name: str, model: nn.Module, stacks: list[str]) -> str:
    """The module whose flat parameter a tensor belongs to: its layer, or a child of the backbone or of the model."""
    for stack in stacks:
        if name.startswith(f"{stack}."):
            return f"{stack}.{name[len(stack) + 1 :].split('.')[0]}"
    parts = name.split(".")[:-1]
    inside = 2 if parts and parts[0] == getattr(model, "base_model_prefix", "") else 1
    return ".".join(parts[:inside])
