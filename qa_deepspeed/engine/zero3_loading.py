"""Loading a model; under ZeRO-3 its parameters are born partitioned, and every rank reads its own share of each.

Transformers' own loading under ZeRO-3 gathers every parameter on every rank and sends it round from rank 0; here the
checkpoint's files are mapped into memory and a rank copies out of them what it will keep, so that a parameter is whole
nowhere but in the moment it is made. Names, missing weights and tied ones stay Transformers' business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.utils.loading_report import LoadStateDictInfo

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.engine import import_deepspeed
from qa_deepspeed.models.loading import load_model
from qa_deepspeed.utils import dist

STEP = "_load_pretrained_model"
"""The part of `from_pretrained` that reads weights into a model that has been made; a private one, so its arguments are
looked at before it is replaced."""


def load(
    options: RunOptions, model_config: PretrainedConfig, config: dict[str, Any]
) -> tuple[torch.nn.Module, list[str]]:
    """`models.loading.load_model`, by shares under a DeepSpeed config of stage 3. Collective there.

    Raises:
        UserError: as `load_model`.
    """
    if config.get("zero_optimization", {}).get("stage", 0) != 3:
        return load_model(options, model_config)
    import_deepspeed(options.verbose_logging)
    from transformers.integrations import HfDeepSpeedConfig

    partitioning = HfDeepSpeedConfig(config)  # Transformers holds it by a weak reference, and looks for it
    with _own_shares():
        model, fresh = load_model(options, model_config, put=fill)
    del partitioning
    return model, fresh


def fill(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Give a parameter or buffer, partitioned or not, its `value`, which every rank passes whole. Collective.

    Raises:
        RuntimeError: shapes differ.
    """
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if shape != value.shape:
        raise RuntimeError(f"shape {tuple(value.shape)} does not fit {tuple(shape)}")
    share: Any = getattr(parameter, "ds_tensor", None)
    with torch.no_grad():
        if share is None:
            parameter.copy_(value)
        elif _only_deepspeed_can_write(parameter):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if dist.is_rank_zero():
                    parameter.copy_(value)
        else:
            begin = min(dist.rank() * share.numel(), value.numel())
            real = min(share.numel(), value.numel() - begin)  # the rest is padding
            share.narrow(0, 0, real).copy_(value.reshape(-1).narrow(0, begin, real))


def _only_deepspeed_can_write(parameter: Any) -> bool:
    """Whether a share lies on NVMe, is quantized, or has a second copy on the node (ZeRO++)."""
    share = parameter.ds_tensor
    quantized = hasattr(share, "ds_quant_scale")
    return share.final_location is not None or quantized or parameter.ds_secondary_tensor is not None


@contextlib.contextmanager
def _own_shares() -> Iterator[None]:
    """Inside, `from_pretrained` reads weights by `_read_shares` where it can."""
    whole = inspect.getattr_static(PreTrainedModel, STEP)
    theirs: Callable[..., Any] = getattr(PreTrainedModel, STEP)
    if list(inspect.signature(theirs).parameters)[:4] != ["model", "state_dict", "checkpoint_files", "load_config"]:
        yield
        return

    def read(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *rest: Any) -> Any:
        mapped = checkpoint_files and all(str(name).endswith(".safetensors") for name in checkpoint_files)
        renamings = load_config.weight_mapping or []
        plain = not any(isinstance(entry, WeightConverter) for entry in renamings) and not load_config.is_quantized
        if state_dict is not None or not mapped or not plain:
            return theirs(model, state_dict, checkpoint_files, load_config, *rest)
        return _read_shares(model, checkpoint_files, renamings), None

    setattr(PreTrainedModel, STEP, staticmethod(read))
    try:
        yield
    finally:
        setattr(PreTrainedModel, STEP, whole)


def _read_shares(model: Any, files: list[str], renamings: list[Any]) -> LoadStateDictInfo:
    """Fill the model out of safetensors files; what is missing is left for Transformers to draw."""
    ours = model.state_dict(keep_vars=True)
    nothing: dict[str, Any] = {field.name: set() for field in dataclasses.fields(LoadStateDictInfo)}
    found = LoadStateDictInfo(**nothing | {"missing_keys": set(ours), "error_msgs": [], "conversion_errors": {}})
    if renamings:
        model._weight_conversions = renamings  # saving applies them backwards
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            for stored in names:
                name, _ = rename_source_key(stored, renamings, [], model.base_model_prefix, ours)
                if name not in ours:
                    found.unexpected_keys.add(name)
                    continue
                found.missing_keys.discard(name)
                value = file.get_tensor(stored)  # mapped: pages that are not copied are not read
                shape = getattr(ours[name], "ds_shape", ours[name].shape)
                if value.shape != shape:
                    found.mismatched_keys.add((name, value.shape, shape))
                    continue
                fill(ours[name], value)
                ours[name]._is_hf_initialized = True
    return found
