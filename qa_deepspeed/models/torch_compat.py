"""Private names of torch: attention over rows of several lengths on GPUs, without a package of its own, and copies.

torch's public function for this (torch.nn.attention.varlen) has no dropout. `check_supported` looks for the names at
start.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from qa_deepspeed.utils.supported import require_names

NAMES = {"torch.ops:aten": "_flash_attention_forward _efficient_attention_forward", "torch": "_foreach_copy_"}
"""Private names of torch in use: module and namespace -> operators in it."""

CAUSAL_FROM_TOP_LEFT = 1
"""`custom_mask_type` of the memory-efficient attention; 0 is no mask."""


@functools.cache
def check_supported() -> None:
    """Check once in a process that the operators are there.

    Raises:
        UserError: one is missing.
    """
    require_names("torch", {place: names.split() for place, names in NAMES.items()})


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into its target, by few kernels where devices and dtypes are the same."""
    torch._foreach_copy_(targets, sources)


class PackedRows(NamedTuple):
    """Where packed rows lie, and what their tokens attend to."""

    bounds: Tensor
    """First token of each row, and the number of tokens, int32 `[rows + 1]`."""
    longest: int
    """Tokens of the longest row, or more."""
    causal: bool
    """Whether tokens attend to those before them only."""
    window: int | None = None
    """Tokens at this distance or further are not attended to."""


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, rows: PackedRows, dropout: float, scale: float
) -> Tensor:
    """Attention within rows in half precision on a GPU (Dao 2023); has a derivative. `[tokens, heads, width]` each."""
    before = None if rows.window is None else rows.window - 1
    output: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        rows.bounds,
        rows.bounds,
        rows.longest,
        rows.longest,
        dropout,
        rows.causal,
        False,
        scale=scale,
        window_size_left=before,
        window_size_right=0 if rows.causal and before is not None else before,
    )[0]
    return output


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, *, rows: PackedRows, dropout: float, scale: float
) -> Tensor:
    """As `flash_attention`, in any precision and without a window (Rabe & Staats 2021)."""
    output: Tensor = torch.ops.aten._efficient_attention_forward(
        query.unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        None,
        rows.bounds,
        rows.bounds,
        rows.longest,
        rows.longest,
        dropout,
        CAUSAL_FROM_TOP_LEFT if rows.causal else 0,
        True,
        scale=scale,
    )[0]
    return output.squeeze(0)
