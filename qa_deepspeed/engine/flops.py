"""How fast a device multiplies matrices, and how many multiplications a model's training step is made of."""

from __future__ import annotations

import time
from typing import Any

import torch

from qa_deepspeed.engine.deepspeed_compat import full_shape

_SECONDS = {"cpu": 0.3, "cuda": 0.1}
_WIDTH = {"cpu": 1024, "cuda": 8192}


def measured_peak_flops(device: torch.device, kind: torch.dtype) -> float:
    """Floating-point operations a second of square matrix products of this type on this device, best of several.

    All ranks of a node measure at the same time, so that they share its cores and memory as they do in training. A
    GPU's record of its greatest use of memory begins anew.
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
        if began is None:  # the first product starts up libraries and clocks
            began = now
            continue
        best = min(best, now - start)
        if now - began > _SECONDS[device.type]:
            del one, other, product
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)  # these matrices are not the run's
            return 2 * width**3 / best


def training_flops(model: torch.nn.Module, model_config: Any) -> tuple[float, float]:
    """Matrix operations of a forward and a backward pass: (per token, per pair of tokens of one row).

    6 for each weight of a matrix that every token meets (Kaplan et al. 2020, section 2.1; embeddings are looked up and
    do not count), 4 where the weight is frozen and has no gradient, and 12 x layers x width for each pair that attends
    (Chowdhery et al. 2022, appendix B). What gradient checkpointing computes again does not count: utilisation is of
    the model, not of the machine.
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
