"""Attention within rows, padded or packed end to end, as Transformers' models call it.

One function serves both layouts on both devices: on CPUs with the kernel of cpu_attention.py, on GPUs with torch's
attention over rows of several lengths.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from qa_deepspeed.models.attention.cpu_attention import dropped_attention
from qa_deepspeed.models.attention.cpu_dropout import CpuDropout
from qa_deepspeed.models.torch_compat import PackedRows, check_supported, flash_attention, memory_efficient_attention
from qa_deepspeed.models.transformers_compat import (
    masks_padding_only,
    torch_attention,
    torch_attention_mask,
    uses_torch_attention,
)

NAME = "rows"
"""Name of this attention in Transformers' registry."""

FLASH_WIDTHS = range(8, 257, 8)
"""Widths of a head that torch's flash attention takes."""


def speed_up_on_cpu(model: Any, keep_attention: bool = False) -> None:
    """Set this attention and the fast dropout in a model that uses Transformers' attention interface.

    Other architectures (XLNet, XLM, DeBERTa, T5) keep their attention and get the dropout only, as does any model with
    `keep_attention`.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, CpuDropout(child.p).train(child.training))
    if not keep_attention:
        set_row_attention(model)


def set_row_attention(model: Any) -> bool:
    """Set this attention in a model that works with torch's by Transformers' interface; whether it does."""
    if not uses_torch_attention(model):
        return False
    check_supported()
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _bounds_or_mask)
    model.set_attn_implementation(NAME)
    return True


def _bounds_or_mask(*, mask_function: Any, attention_mask: Tensor | None, **rest: Any) -> Tensor | None:
    """The attention's mask, once for a forward pass.

    None for packed rows, which come without a mask of padding; on CPUs `[rows, 2]`, first and last + 1 token of each
    row, if only padding is masked (tokens are contiguous); else the `[rows, 1, length, length]` mask of torch's
    attention.
    """
    if attention_mask is None:
        return None
    if masks_padding_only(mask_function) and attention_mask.ndim == 2 and attention_mask.device.type == "cpu":
        real = attention_mask.to(torch.int8)
        begin = real.argmax(dim=1)
        return torch.stack([begin, begin + attention_mask.sum(dim=1)], dim=1)
    return torch_attention_mask(mask_function=mask_function, attention_mask=attention_mask, **rest)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface; `query`, `key`, `value` `[rows, heads, length, width]`.

    With `cu_seq_lens_q` the rows are packed: `[1, heads, tokens, width]`.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if rest.get("cu_seq_lens_q") is not None:
        return _packed(module, query, key, value, scale, dropout, rest), None
    same_shape = query.shape == key.shape == value.shape
    if attention_mask is None or attention_mask.ndim != 2 or not same_shape:
        return torch_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **rest)
    if not 0.0 < dropout < 1.0:
        mask = _added_to_scores(attention_mask, query)
        return torch_attention(module, query, key, value, mask, scaling=scale, dropout=dropout, **rest)
    spans = [(row, begin, end) for row, (begin, end) in enumerate(attention_mask.tolist())]
    return dropped_attention(query, key, value, spans, scale, dropout), None


def _added_to_scores(spans: Tensor, query: Tensor) -> Tensor | None:
    """0 at tokens and minus infinity at padding, `[rows, 1, 1, length]`; None without padding.

    torch would expand a boolean mask to all pairs of tokens in every layer.
    """
    token = torch.arange(query.shape[2])
    padding = (token < spans[:, :1]) | (token >= spans[:, 1:])
    if not padding.any():
        return None
    return query.new_zeros(padding.shape).masked_fill_(padding, float("-inf"))[:, None, None, :]


def _packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    dropout: float,
    arguments: dict[str, Any],
) -> Tensor:
    """Attention within packed rows; `query` `[1, heads, tokens, width]`, the output `[1, tokens, heads, width]`.

    Args:
        arguments: of Transformers: `cu_seq_lens_q` int32 `[rows + 1]`, where rows begin and the last ends;
            `max_length_q`; `is_causal`, by default the module's; `sliding_window`, the distance from which on tokens
            are not attended to.
    """
    bounds: Tensor = arguments["cu_seq_lens_q"]
    window: int | None = arguments.get("sliding_window")
    asked = arguments.get("is_causal")
    causal = bool(getattr(module, "is_causal", False) if asked is None else asked)
    if key.shape[1] != query.shape[1]:  # several query heads use one head of keys and values
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in (key, value))
    if query.device.type == "cpu" and 0.0 < dropout < 1.0 and not causal and window is None:
        spans = [(0, *span) for span in pairwise(bounds.tolist())]
        return dropped_attention(query, key, value, spans, scale, dropout)
    if query.device.type == "cuda" and query.shape[3] == value.shape[3] and query.shape[3] in FLASH_WIDTHS:
        rows = PackedRows(bounds, int(arguments["max_length_q"]), causal, window)
        parts = (one.squeeze(0).transpose(0, 1) for one in (query, key, value))  # [tokens, heads, width]
        if query.dtype in (torch.float16, torch.bfloat16):
            return flash_attention(*parts, rows=rows, dropout=dropout, scale=scale).unsqueeze(0)
        if window is None:
            return memory_efficient_attention(*parts, rows=rows, dropout=dropout, scale=scale).unsqueeze(0)
    return _row_by_row(query, key, value, bounds.tolist(), scale, dropout, causal, window)


def _row_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: list[int],
    scale: float,
    dropout: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    """torch's attention for one packed row after the other."""
    outputs = []
    for begin, end in pairwise(bounds):
        row = slice(begin, end)
        mask = None if window is None or window >= end - begin else _window_mask(end - begin, window, causal, query)
        is_causal = causal and mask is None
        outputs.append(
            functional.scaled_dot_product_attention(
                query[:, :, row], key[:, :, row], value[:, :, row], mask, dropout, is_causal, scale=scale
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _window_mask(length: int, window: int, causal: bool, query: Tensor) -> Tensor:
    """True where a token attends to another, bool `[length, length]`."""
    token = torch.arange(length, device=query.device)
    distance = token.unsqueeze(1) - token
    near = distance.abs() < window
    return near & (distance >= 0) if causal else near
