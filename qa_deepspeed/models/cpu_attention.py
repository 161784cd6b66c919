"""Attention for training on CPUs: row by row without padding, a few heads at a time.

torch's attention with dropout passes over all scores of a batch `[rows, heads, length, length]` a dozen times, in main
memory. Here the scores of a few heads stay in the processor's cache from the product of queries and keys to the product
with the values, and padding is not computed. The formula is that of Vaswani et al. 2017, section 3.2.1, with dropout on
the probabilities.
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
"""Name of this attention in Transformers' registry."""

Spans = list[list[int]]
"""First and last + 1 token of each row."""

SCORES_AT_ONCE = 250_000
"""Attention scores that are computed together: 1 MB in float32, half of a usual second-level cache."""


def speed_up_on_cpu(model: Any, keep_attention: bool = False) -> None:
    """Set this attention and the fast dropout in a model that uses Transformers' attention interface.

    Other architectures (XLNet, XLM, DeBERTa, T5) keep their attention and get the dropout only, as does any model with
    `keep_attention`.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, CpuDropout(child.p).train(child.training))
    if keep_attention:
        return
    if uses_torch_attention(model):
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _spans_or_mask)
        model.set_attn_implementation(NAME)


def _spans_or_mask(*, mask_function: Any, attention_mask: Tensor | None, **rest: Any) -> Tensor | None:
    """The attention's mask: `[rows, 2]`, first and last + 1 token of each row, if only padding is masked (tokens are
    contiguous); else the `[rows, 1, length, length]` mask of torch's attention."""
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
    spans: Spans = attention_mask.tolist()
    output: Tensor = _DroppedAttention.apply(query, key, value, spans, scale, dropout)  # type: ignore[no-untyped-call]
    return output, None


def _added_to_scores(spans: Tensor, query: Tensor) -> Tensor | None:
    """0 at tokens and minus infinity at padding, `[rows, 1, 1, length]`; None without padding.

    torch would expand a boolean mask to all pairs of tokens in every layer.
    """
    token = torch.arange(query.shape[2])
    padding = (token < spans[:, :1]) | (token >= spans[:, 1:])
    if not padding.any():
        return None
    return query.new_zeros(padding.shape).masked_fill_(padding, float("-inf"))[:, None, None, :]


def _rows(spans: Spans, heads: int) -> list[tuple[int, slice, int]]:
    """(row, its tokens, number of heads that are computed together) of every row."""
    together = [max(1, min(heads, SCORES_AT_ONCE // max(1, (end - begin) ** 2))) for begin, end in spans]
    return [(row, slice(*span), some) for row, (span, some) in enumerate(zip(spans, together, strict=True))]


class _DroppedAttention(torch.autograd.Function):
    """Attention with dropout on the probabilities; the output is `[rows, length, heads, width]`.

    Probabilities are float32 for any dtype of the values, as in torch.
    """

    @staticmethod
    def forward(
        context: Any, query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float, dropout: float
    ) -> Tensor:
        rows, heads, length, width = query.shape
        output = _zero_at_padding(query.new_empty(rows, length, heads, width), spans)
        masks, work = KeepMasks(dropout), _WorkSpace()
        kept, probabilities = [], []
        with torch.autocast("cpu", enabled=False):
            for row, tokens, together in _rows(spans, heads):
                parts = [
                    _split(query[row, :, tokens], together),
                    _split(key[row, :, tokens].transpose(1, 2), together),
                    _split(value[row, :, tokens], together),
                    _split(output[row, tokens].transpose(0, 1), together),
                ]
                for q, k_transposed, v, out in zip(*parts, strict=True):
                    probability = torch.softmax(work.product(scale, q, k_transposed), dim=-1, dtype=torch.float32)
                    keep = masks.draw(*probability.shape)
                    _product_into(out, masks.scale, work.kept(probability, keep).to(value.dtype), v)
                    probabilities.append(probability)
                    kept.append(keep)
        context.save_for_backward(query, key, value, *probabilities)
        context.rest = (spans, scale, masks.scale, kept)
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *probabilities = context.saved_tensors
        spans, scale, kept_scale, kept = context.rest
        heads, work = query.shape[1], _WorkSpace()
        query_grad, key_grad, value_grad = (_zero_at_padding(query.new_empty(gradient.shape), spans) for _ in range(3))
        with torch.autocast("cpu", enabled=False):
            saved = zip(probabilities, kept, strict=True)
            for row, tokens, together in _rows(spans, heads):
                by_row = (each[row, tokens].transpose(0, 1) for each in (gradient, query_grad, key_grad, value_grad))
                parts = [
                    _split(query[row, :, tokens], together),
                    _split(key[row, :, tokens], together),
                    _split(value[row, :, tokens].transpose(1, 2), together),
                    *(_split(each, together) for each in by_row),
                ]
                for q, k, v_transposed, grad, q_grad, k_grad, v_grad in zip(*parts, strict=True):
                    probability, keep = next(saved)
                    dropped = work.kept(probability, keep)
                    _product_into(v_grad, kept_scale, dropped.to(value.dtype).transpose(1, 2), grad)
                    # without the scale of kept values, which the two products below apply
                    score_grad = work.product(1.0, grad, v_transposed).float().mul_(dropped)
                    score_grad.addcmul_(probability, score_grad.sum(dim=-1, keepdim=True), value=-1)
                    score_grad = score_grad.to(query.dtype)
                    _product_into(q_grad, kept_scale * scale, score_grad, k)
                    _product_into(k_grad, kept_scale * scale, score_grad.transpose(1, 2), q)
        return query_grad.transpose(1, 2), key_grad.transpose(1, 2), value_grad.transpose(1, 2), None, None, None


def _split(values: Tensor, heads: int) -> tuple[Tensor, ...]:
    """`values` `[heads, ...]` in parts of this many heads."""
    return torch.split(values, heads)


def _zero_at_padding(values: Tensor, spans: Spans) -> Tensor:
    """`values` `[rows, length, ...]` with zeros at padding; the other places are not set."""
    for row, (begin, end) in enumerate(spans):
        values[row, :begin] = 0
        values[row, end:] = 0
    return values


def _product_into(place: Tensor, factor: float, left: Tensor, right: Tensor) -> None:
    """Write `factor` x `left` x `right` to `place` `[heads, tokens, width]`, a view of a larger tensor."""
    torch.baddbmm(place, left, right, beta=0, alpha=factor, out=place)


class _WorkSpace:
    """Buffers for scores that are reused from part to part, so that they stay in the processor's cache."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[str, torch.dtype], Tensor] = {}

    def product(self, factor: float, left: Tensor, right: Tensor) -> Tensor:
        """`factor` x `left` x `right`, valid until the next product."""
        place = self._block("product", (*left.shape[:2], right.shape[2]), left.dtype)
        return torch.baddbmm(place, left, right, beta=0, alpha=factor, out=place)

    def kept(self, probability: Tensor, keep: Tensor) -> Tensor:
        """The kept probabilities, valid until the next call."""
        return self._block("kept", probability.shape, probability.dtype).copy_(keep).mul_(probability)

    def _block(self, name: str, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        count = math.prod(shape)
        block = self._blocks.get((name, kind))
        if block is None or len(block) < count:
            block = self._blocks[name, kind] = torch.empty(count, dtype=kind)
        return block[:count].view(shape)
