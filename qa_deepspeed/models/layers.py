"""The layers of a model: where each tensor stands, which are frozen, and learning rates that fall with depth.

Layers are found in the structure of the model, not by the names of an architecture: they are the items of its outermost
`ModuleList`s. Embeddings are tensors outside of all layers that an `nn.Embedding` holds or whose name says so (their
norms and projections); the rest (the head, norms after the layers) counts as the head.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.loading import model_from_config
from qa_deepspeed.utils.errors import UserError

EMBEDDINGS = -1
"""Place of the embeddings: below layer 0. The place of the head is the number of layers."""


@dataclass(frozen=True)
class Layers:
    """The layers of a model, numbered from 0 as the forward pass meets them (those of an encoder, then a decoder's).

    first: path of a list of layers -> number of its first layer. embeddings: paths of the `nn.Embedding`s.
    """

    count: int
    first: dict[str, int]
    embeddings: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> Layers:
        """The layers of a model; none if it repeats no layer or shares one layer's weights (ALBERT)."""
        first: dict[str, int] = {}
        count, before, length = 0, "", 0
        for path in layer_lists(model):
            size, parent = len(model.get_submodule(path)), path.rpartition(".")[0]  # type: ignore[arg-type]
            beside = parent == before and size == length and not isinstance(model.get_submodule(parent), nn.ModuleList)
            first[path] = count - size if beside else count  # XLM's layers are spread over several lists
            count += 0 if beside else size
            before, length = parent, size
        embeddings = {path for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
        return cls(count, first, frozenset(embeddings))

    def place(self, tensor: str) -> int:
        """Where a tensor of this name stands: the number of its layer, `EMBEDDINGS`, or `count` for the head."""
        for path, first in self.first.items():
            if tensor.startswith(f"{path}."):
                return first + int(tensor[len(path) + 1 :].split(".")[0])
        owner = tensor.rpartition(".")[0]
        return EMBEDDINGS if owner in self.embeddings or "emb" in tensor else self.count

    def name(self, place: int) -> str:
        """A place in words."""
        top = "head" if self.count else "others"
        return "embeddings" if place == EMBEDDINGS else top if place == self.count else f"layer {place}"

    def rate(self, place: int, learning_rate: float, decay: float) -> float:
        """The peak learning rate of a place: the head's, times the decay for each step down (Clark et al. 2020)."""
        return learning_rate * decay ** (self.count - place)


def layer_lists(model: nn.Module) -> list[str]:
    """Paths of the lists of layers, none inside another; of a list of lists (Funnel) those inside."""
    found: list[str] = []
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) > 1
            and not any(isinstance(item, nn.ModuleList) for item in module)
            and not any(path.startswith(f"{one}.") for one in found)
        ):
            found.append(path)
    return found


def check_layers(options: RunOptions, config: Any) -> None:
    """Raises UserError for a `freeze` or `layerwise_lr_decay` that the model cannot have; no weights are loaded."""
    if options.freeze is None and options.layerwise_lr_decay == 1:
        return
    if options.freeze is not None and options.lora_rank is not None:
        raise UserError("freeze: with lora_rank all weights but the adapters and the head are frozen: leave one out")
    try:
        with torch.device("meta"):
            layers = Layers.of(model_from_config(copy.deepcopy(config), options.qa_head))
    except ValueError:  # there is no model of this type, which is an error of its own
        return
    frozen_places(options.freeze, layers, config.model_type)
    if options.layerwise_lr_decay != 1:
        _require_layers(layers, config.model_type, "layerwise_lr_decay")


def freeze(model: nn.Module, freeze: str | None) -> None:
    """Freeze the embeddings and layers that the option `freeze` names, in place.

    Raises:
        UserError: it names something that the model does not have.
    """
    config: Any = getattr(model, "config", None)
    layers = Layers.of(model)
    places = frozen_places(freeze, layers, getattr(config, "model_type", type(model).__name__))
    for name, parameter in model.named_parameters():
        if layers.place(name) in places:
            parameter.requires_grad_(False)


def frozen_places(freeze: str | None, layers: Layers, model_type: str) -> frozenset[int]:
    """`named_places`, each of which the model must have.

    Raises:
        UserError: as `named_places`, or the model has no such layer.
    """
    places = named_places(freeze)
    if max(places, default=EMBEDDINGS) > EMBEDDINGS:
        _require_layers(layers, model_type, f"freeze {freeze}")
    if max(places, default=EMBEDDINGS) >= layers.count > 0:
        raise UserError(f"freeze {freeze}: the {model_type} has the layers 0 to {layers.count - 1}, not {max(places)}")
    return places


def named_places(freeze: str | None) -> frozenset[int]:
    """The places that a text like `embeddings,0-5` names.

    Raises:
        UserError: a part of it is no place.
    """
    found: set[int] = set()
    for part in (part.strip() for part in (freeze or "").split(",")):
        numbers = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if part == "embeddings":
            found.add(EMBEDDINGS)
        elif numbers is not None and int(numbers[1]) <= int(numbers[2] or numbers[1]):
            found.update(range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1))
        elif part:
            raise UserError(f"freeze: '{part}' is neither embeddings, nor a layer like 3, nor layers like 0-5")
    return frozenset(found)


def _require_layers(layers: Layers, model_type: str, option: str) -> None:
    if not layers.count:
        raise UserError(f"{option}: a {model_type} has no layers with weights of their own: leave it out")
