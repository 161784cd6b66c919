"""Types of floating-point numbers by the names of precisions."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Name of a precision, as in DeepSpeed's configs -> type."""

LONG_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
"""The same types by torch's names: float32, bfloat16, float16."""


def dtype_named(name: str) -> torch.dtype:
    """The type by any name that DeepSpeed's configs have for it: bf16, bfloat16, torch.bfloat16, half ..."""
    return {**DTYPES, **LONG_NAMES, "half": torch.float16, "float": torch.float32}[name.removeprefix("torch.")]


def weight_dtype(precision: str) -> torch.dtype:
    """Type of the weights in a forward pass of a precision; torch_autocast keeps them in float32."""
    return DTYPES.get(precision, torch.float32)
