"""A student that starts from some layers of a model (Sanh et al. 2019): which models can, and the student's weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import torch

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.layers import layer_lists
from qa_deepspeed.models.loading import chosen_layers, load_config, load_model, missing_in_backbone, model_from_config
from qa_deepspeed.utils.errors import UserError


def check_student_layers(options: RunOptions) -> None:
    """Raises UserError if layers of the model cannot be chosen; no weights are loaded."""
    if options.student_layers is None:
        return
    config = load_config(dataclasses.replace(options, student_layers=None))
    with torch.device("meta"):
        _stack(model_from_config(config, options.qa_head), config.num_hidden_layers)


def student_weights(options: RunOptions) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state dict of a student of `student_layers`, and the names of weights that the checkpoint has not.

    The full model is read into host memory.

    Raises:
        UserError: as `load_model`, or the checkpoint lacks weights of the model itself.
    """
    layers = chosen_layers(options)
    assert layers is not None, "layers are chosen"
    whole = dataclasses.replace(options, student_layers=None)
    config = load_config(whole)
    model, fresh = load_model(whole, config)
    lost = missing_in_backbone(model, fresh)
    if lost:
        raise UserError(f"student_layers: {options.model_name_or_path} has not all its weights ({lost[0]}, ...)")
    return _weights_of_layers(model, layers, config.num_hidden_layers), fresh


def _stack(model: torch.nn.Module, count: int) -> str:
    """The name of the list that holds a model's `count` layers. Raises: UserError if there is no such list alone."""
    lists = layer_lists(model)
    if len(lists) != 1 or len(model.get_submodule(lists[0])) != count:  # type: ignore[arg-type]
        raise UserError(
            f"student_layers: a {type(model).__name__} has no single stack of layers to choose from: leave it out"
        )
    return lists[0]


def _weights_of_layers(model: torch.nn.Module, layers: Sequence[int], count: int) -> dict[str, torch.Tensor]:
    """The state dict of a model with these of its `count` layers, numbered from 0."""
    pattern = re.compile(rf"{re.escape(_stack(model, count))}\.(\d+)\.(.*)")
    found = {}
    for name, value in model.state_dict().items():
        match = pattern.fullmatch(name)
        if match is None:
            found[name] = value
        elif int(match[1]) in layers:
            found[f"{name[: match.start(1)]}{layers.index(int(match[1]))}.{match[2]}"] = value
    return found
