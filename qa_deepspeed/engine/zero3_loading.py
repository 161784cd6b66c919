"""Loading a model; under ZeRO-3 its parameters are made partitioned, and each rank reads its own partition of each.

Transformers' own loading under ZeRO-3 gathers every parameter on every rank and broadcasts it from rank 0; here the
checkpoint's files are mapped into memory and a rank copies from them only what it keeps, so that a full parameter
exists for a moment only, when it is made. Names, missing weights and tied ones stay with Transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from transformers import PretrainedConfig

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.compiled_ops import builds_reported
from qa_deepspeed.engine.deepspeed_compat import (
    forget_secondary_group,
    full_shape,
    is_plain_partition,
    partition_of,
    place_of_partition,
)
from qa_deepspeed.engine.engine import import_deepspeed
from qa_deepspeed.models import transformers_compat
from qa_deepspeed.models.loading import load_model, model_from_config
from qa_deepspeed.models.student_layers import student_weights
from qa_deepspeed.utils import dist


def load(
    options: RunOptions, model_config: PretrainedConfig, config: dict[str, Any]
) -> tuple[torch.nn.Module, list[str]]:
    """`models.loading.load_model`, or a student with some layers of that model (`student_layers`); partitioned under a
    DeepSpeed config of stage 3. Collective there.

    Raises:
        UserError: as `load_model` or `student_weights`.
    """
    partitions = config.get("zero_optimization", {}).get("stage", 0) == 3
    if options.student_layers is not None:
        return _load_student(options, model_config, config if partitions else None)
    if not partitions:
        return load_model(options, model_config)
    with (
        _partitioned(options, config),
        transformers_compat.reading_weights_by(_read_partitions, _report_unpartitioned),
    ):
        return load_model(options, model_config, fill=fill)


@contextlib.contextmanager
def _partitioned(options: RunOptions, config: dict[str, Any]) -> Iterator[None]:
    """Inside, Transformers makes models with partitioned parameters."""
    forget_secondary_group(import_deepspeed(options.verbose_logging))
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    partitioning = HfDeepSpeedConfig(config)  # type: ignore[no-untyped-call]  # Transformers looks for it, by a weak reference
    with builds_reported(options.timeout):
        yield
    del partitioning


def _load_student(
    options: RunOptions, model_config: PretrainedConfig, config: dict[str, Any] | None
) -> tuple[torch.nn.Module, list[str]]:
    """A model with some layers of another, which every rank reads before; partitioned if `config` is given."""
    weights, fresh = student_weights(options)
    with contextlib.nullcontext() if config is None else _partitioned(options, config):
        model = model_from_config(model_config, options.qa_head, options.attn_implementation).eval()
        places = model.state_dict(keep_vars=True)
        assert places.keys() == weights.keys(), "the student has the weights of its layers"
        for name, value in weights.items():
            fill(places[name], value)
    return model, fresh


def fill(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Set a parameter or buffer, partitioned or not, to its full `value`, which every rank passes. Collective.

    Raises:
        RuntimeError: shapes differ.
    """
    shape = full_shape(parameter)
    if shape != value.shape:
        raise RuntimeError(f"shape {tuple(value.shape)} does not fit {tuple(shape)}")
    partition = partition_of(parameter)
    with torch.no_grad():
        if partition is None:
            parameter.copy_(value)
        elif is_plain_partition(parameter):
            begin, real = place_of_partition(parameter, dist.rank())
            partition.narrow(0, 0, real).copy_(value.reshape(-1).narrow(0, begin, real))
        else:
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if dist.is_rank_zero():
                    parameter.copy_(value)


def _report_unpartitioned(reason: str) -> None:
    """Report that the loading does not read partitions."""
    dist.log0(f"note: {reason}: Transformers reads the full model on rank 0 and broadcasts it, which takes more memory")


def _read_partitions(model: Any, files: list[str], renamings: list[Any]) -> Any:
    """Fill the model from safetensors files; missing weights are left for Transformers to draw."""
    parameters = model.state_dict(keep_vars=True)
    report = transformers_compat.load_report(missing=parameters)
    if renamings:
        transformers_compat.set_renamings(model, renamings)
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            for stored in names:
                name = transformers_compat.name_in_model(stored, renamings, model, parameters)
                if name not in parameters:
                    report.unexpected_keys.add(name)
                    continue
                report.missing_keys.discard(name)
                value = file.get_tensor(stored)  # mapped: pages that are not copied are not read
                shape = full_shape(parameters[name])
                if value.shape != shape:
                    report.mismatched_keys.add((name, value.shape, shape))
                    continue
                fill(parameters[name], value)
                transformers_compat.mark_as_loaded(parameters[name])
    return report
