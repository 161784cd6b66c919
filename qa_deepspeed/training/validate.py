"""Checks of a run's options that need neither data nor weights; `train` and `check` share them."""

from __future__ import annotations

import dataclasses

from qa_deepspeed.config.intervals import Intervals
from qa_deepspeed.config.run_options import RunOptions, check_counts, check_distillation, check_objective
from qa_deepspeed.engine import deepspeed_compat, ds_config
from qa_deepspeed.engine.ds_config import ResolvedConfig
from qa_deepspeed.engine.monitors import require_packages
from qa_deepspeed.engine.optim import check_layerwise
from qa_deepspeed.models import transformers_compat
from qa_deepspeed.models.compiled_layers import require_compiler
from qa_deepspeed.models.lora import check_lora
from qa_deepspeed.runs.hub_upload import check_upload
from qa_deepspeed.training.best_checkpoint import BestCheckpoint
from qa_deepspeed.training.evaluation.scoring import evaluation_options
from qa_deepspeed.training.reporting.profiler import profiled_steps
from qa_deepspeed.training.stopping import duration


def validate_options(options: RunOptions, world_size: int, device_type: str, bf16_supported: bool) -> ResolvedConfig:
    """Check the options of a training run and merge them with its DeepSpeed config.

    Args:
        world_size: number of ranks.
        device_type: "cpu" or "cuda".
        bf16_supported: whether the device computes in bfloat16.
    Raises:
        UserError: options contradict each other or the config, or a library's version is not supported.
    """
    deepspeed_compat.check_supported()
    transformers_compat.check_supported()
    resolved = ds_config.resolve(options, world_size, device_type, bf16_supported)
    ds_config.check_trainable(resolved)
    options = evaluation_options(resolved.options)
    check_counts(options)
    check_objective(options)
    check_distillation(options)
    check_lora(options)
    check_layerwise(options, resolved.config)
    require_packages(resolved.config, options)
    if options.torch_compile:
        require_compiler(device_type, resolved.zero_stage)
    Intervals.of(options, steps=1, epoch_steps=1)
    profiled_steps(options.profile_steps)
    duration(options.save_on_time, "save_on_time")
    duration(options.max_time, "max_time")
    BestCheckpoint(options)
    if options.push_to_hub:
        check_upload(options.push_to_hub)
    return dataclasses.replace(resolved, options=options)
