"""Measured peak FLOP/s of a device, and FLOPs of a training step: the two parts of MFU (model FLOPs utilization)."""

from __future__ import annotations

import time
from typing import Any

import torch

from qa_deepspeed.engine.deepspeed_compat import full_shape

_SECONDS = {"cpu": 0.3, "cuda": 0.1}
_WIDTH = {"cpu": 1024, "cuda": 8192}


def measured_peak_flops(device: torch.device, kind: torch.dtype) -> float:
    """FLOP/s of square matrix products of this dtype on this device, the best of several.

    All ranks of a node measure at the same time, so that they share its cores and memory as in training. Resets a GPU's
    peak memory statistics.
    """
    width = _WIDTH[device.type]
    one, other = (torch.randn(width, width, device=device).to(kind) for _ in range(2))
    best, began = float("inf"), None
    while True:
        start = time.perf_counter()
        product = one @ other
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if began is None:  # the first product includes the start of libraries
            began = now
            continue
        best = min(best, now - start)
        if now - began > _SECONDS[device.type]:
            del one, other, product
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)  # without these matrices
            return 2 * width**3 / best


def training_flops(model: torch.nn.Module, model_config: Any) -> tuple[float, float]:
    """FLOPs in matrix products of a forward and a backward pass: (per token, per pair of tokens of one row).

    6 for each weight of a matrix that every token is multiplied by (Kaplan et al. 2020, section 2.1; embeddings are
    looked up and do not count), 4 where the weight is frozen and has no gradient, and 12 x layers x width for each pair
    of tokens in attention (Chowdhery et al. 2022, appendix B). Recomputation by gradient checkpointing does not count:
    MFU is of the model's FLOPs, not of the hardware's.
    """
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    shapes = [(parameter, full_shape(parameter)) for parameter in model.parameters()]
    operations = sum(
        shape.numel() * (6.0 if parameter.requires_grad else 4.0)
        for parameter, shape in shapes
        if len(shape) > 1 and id(parameter) not in looked_up
    )
    layers = next(
        (
            getattr(model_config, name)
            for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
            if hasattr(model_config, name)
        ),
        0,
    )
    width = next(
        (
            getattr(model_config, name)
            for name in ("hidden_size", "d_model", "dim", "n_embd")
            if isinstance(getattr(model_config, name, None), int)
        ),
        0,
    )
    return operations, 12.0 * layers * width
