"""torch.compile for the layers of a model: fewer, larger kernels.

On an H100 it makes a step of 16 rows 7 to 20 % faster where CUDA graphs run it already, and takes 3 to 11 s for each
shape (tests/bench/history/h100_baseline.md): it pays off after some ten thousand steps. On CPUs it is slower than the
kernels of this package (tests/bench/README.md).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

from qa_deepspeed.models.layers import layer_lists
from qa_deepspeed.utils.errors import UserError


def require_compiler(device_type: str, zero_stage: int) -> None:
    """Check that layers can be compiled for a device at a ZeRO stage.

    Raises:
        UserError: a compiler or Triton is missing, or the stage partitions the layers' parameters.
    """
    if zero_stage == 3:
        raise UserError("--torch_compile is for ZeRO 0 to 2: ZeRO-3 gathers parameters between a layer's operations")
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(f"--torch_compile needs a C++ compiler, and there is no {compiler}: install it or leave it out")
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--torch_compile needs Triton on a GPU: pip install triton, or leave it out")


def compile_layers(model: Any) -> int:
    """Compile each layer of the model's stacks at its first forward pass, for any number of tokens; their number."""
    layers = [layer for stack in layer_lists(model) for layer in model.get_submodule(stack)]
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)
