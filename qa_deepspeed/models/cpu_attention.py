"""Attention for training on CPUs: row by row, each at its own length, a few heads at a time.

torch's attention with dropout passes over all scores of a batch `[rows, heads, length, length]` a dozen times, in main
memory; here the scores of a few heads stay in the processor's cache from the product of queries and keys to the product
with the values, and padding is never touched. The mathematics is that of Vaswani et al. 2017, section 3.2.1, with
dropout on the probabilities.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from qa_deepspeed.models.cpu_dropout import CpuDropout, KeepMasks
from qa_deepspeed.models.transformers_compat import (
    masks_padding_only,
    torch_attention,
    torch_attention_mask,
    uses_torch_attention,
)

NAME = "rows"
"""Under which Transformers knows this attention."""

SCORES_AT_ONCE = 250_000
"""Attention scores that are worked on together: 1 MB in float32, half of a usual second-level cache."""


def speed_up_on_cpu(model: Any, keep_attention: bool = False) -> None:
    """Give `model` this attention and the fast dropout wherever it works by Transformers' attention interface.

    Other architectures (XLNet, XLM, DeBERTa, T5) keep their own attention and get the dropout only, as
    any does with `keep_attention`.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, CpuDropout(child.p).train(child.training))
    if keep_attention:
        return
    if uses_torch_attention(model):
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _rows_or_mask)
        model.set_attn_implementation(NAME)


def _rows_or_mask(*, mask_function: Any, attention_mask: Tensor | None, **rest: Any) -> Tensor | None:
    """What the attention gets as its mask: `[rows, 2]`, first and last + 1 real token of each row, if padding is all
    that is masked (real tokens are one run); else the `[rows, 1, length, length]` mask of torch's attention."""
    if masks_padding_only(mask_function) and attention_mask is not None and attention_mask.ndim == 2:
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
    """Transformers' attention interface; `query`, `key`, `value` `[rows, heads, length, width]`."""
    same_shape = query.shape == key.shape == value.shape
    if attention_mask is None or attention_mask.ndim != 2 or not same_shape or query.device.type != "cpu":
        return torch_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **rest)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if not 0.0 < dropout < 1.0:
        mask = _added_to_scores(attention_mask, query)
        return torch_attention(module, query, key, value, mask, scaling=scale, dropout=dropout, **rest)
    return _DroppedAttention.apply(query, key, value, attention_mask.tolist(), scale, dropout), None


def _added_to_scores(spans: Tensor, query: Tensor) -> Tensor | None:
    """0 at real tokens and minus infinity at padding, `[rows, 1, 1, length]`; None where there is no padding.

    torch would make of a mask of booleans one of all pairs of tokens in every layer.
    """
    token = torch.arange(query.shape[2])
    padding = (token < spans[:, :1]) | (token >= spans[:, 1:])
    if not padding.any():
        return None
    return query.new_zeros(padding.shape).masked_fill_(padding, float("-inf"))[:, None, None, :]


def _rows(spans: list, heads: int) -> list[tuple[int, slice, int]]:
    """(row, its real tokens, how many of its heads are worked on together) of every row."""
    together = [max(1, min(heads, SCORES_AT_ONCE // max(1, (end - begin) ** 2))) for begin, end in spans]
    return [(row, slice(*span), some) for row, (span, some) in enumerate(zip(spans, together, strict=True))]


class _DroppedAttention(torch.autograd.Function):
    """Attention with dropout on the probabilities; the output is `[rows, length, heads, width]`.

    Probabilities are float32 whatever the type of the values, as in torch.
    """

    @staticmethod
    def forward(
        context: Any, query: Tensor, key: Tensor, value: Tensor, spans: list, scale: float, dropout: float
    ) -> Tensor:
        rows, heads, length, width = query.shape
        output = _zero_at_padding(query.new_empty(rows, length, heads, width), spans)
        masks, work = KeepMasks(dropout), _WorkSpace()
        kept, probabilities = [], []
        with torch.autocast("cpu", enabled=False):
            for row, tokens, together in _rows(spans, heads):
                queries, values = query[row, :, tokens].split(together), value[row, :, tokens].split(together)
                turned_keys = key[row, :, tokens].transpose(1, 2).split(together)
                places = output[row, tokens].transpose(0, 1).split(together)
                for some, turned, worth, place in zip(queries, turned_keys, values, places, strict=True):
                    scores = work.product(scale, some, turned)
                    probability = torch.softmax(scores, dim=-1, dtype=torch.float32)
                    keep = masks.draw(*probability.shape)
                    _product_into(place, masks.scale, work.kept(probability, keep).to(value.dtype), worth)
                    probabilities.append(probability)
                    kept.append(keep)
        context.save_for_backward(query, key, value, *probabilities)
        context.rest = (spans, scale, masks.scale, kept)
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, *probabilities = context.saved_tensors
        spans, scale, kept_scale, kept = context.rest
        heads, work = query.shape[1], _WorkSpace()
        by_query, by_key, by_value = (_zero_at_padding(query.new_empty(gradient.shape), spans) for _ in range(3))
        with torch.autocast("cpu", enabled=False):
            pieces = zip(probabilities, kept, strict=True)
            for row, tokens, together in _rows(spans, heads):
                views = [
                    *(each[row, :, tokens].split(together) for each in (query, key)),
                    value[row, :, tokens].transpose(1, 2).split(together),
                    gradient[row, tokens].transpose(0, 1).split(together),
                    *(each[row, tokens].transpose(0, 1).split(together) for each in (by_query, by_key, by_value)),
                ]
                for some, keys, turned, above, to_query, to_key, to_value in zip(*views, strict=True):
                    probability, keep = next(pieces)
                    dropped = work.kept(probability, keep)
                    _product_into(to_value, kept_scale, dropped.to(value.dtype).transpose(1, 2), above)
                    # without the scale of what is kept, which the products put in at their end
                    by_score = work.product(1.0, above, turned).float().mul_(dropped)
                    by_score.addcmul_(probability, by_score.sum(dim=-1, keepdim=True), value=-1)
                    by_score = by_score.to(query.dtype)
                    _product_into(to_query, kept_scale * scale, by_score, keys)
                    _product_into(to_key, kept_scale * scale, by_score.transpose(1, 2), some)
        by_query, by_key, by_value = (each.transpose(1, 2) for each in (by_query, by_key, by_value))
        return by_query, by_key, by_value, None, None, None


def _zero_at_padding(answer: Tensor, spans: list) -> Tensor:
    """`answer` `[rows, length, ...]` with zeros where there is no real token; the rest is left to be filled."""
    for row, (begin, end) in enumerate(spans):
        answer[row, :begin] = 0
        answer[row, end:] = 0
    return answer


def _product_into(place: Tensor, factor: float, left: Tensor, right: Tensor) -> None:
    """Put `factor` x `left` x `right` into `place` `[heads, tokens, width]` of a larger tensor, without a copy."""
    torch.baddbmm(place, left, right, beta=0, alpha=factor, out=place)


class _WorkSpace:
    """Blocks for scores that are used again from piece to piece, so that they stay in the processor's cache."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[str, torch.dtype], Tensor] = {}

    def product(self, factor: float, left: Tensor, right: Tensor) -> Tensor:
        """`factor` x `left` x `right`, good until the next product."""
        place = self._block("product", (*left.shape[:2], right.shape[2]), left.dtype)
        return torch.baddbmm(place, left, right, beta=0, alpha=factor, out=place)

    def kept(self, probability: Tensor, keep: Tensor) -> Tensor:
        """The kept probabilities, good until the next."""
        return self._block("kept", probability.shape, probability.dtype).copy_(keep).mul_(probability)

    def _block(self, name: str, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        count = math.prod(shape)
        block = self._blocks.get((name, kind))
        if block is None or len(block) < count:
            block = self._blocks[name, kind] = torch.empty(count, dtype=kind)
        return block[:count].view(shape)
