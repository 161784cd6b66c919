"""Attention with dropout for training on CPUs: row by row without padding, a few heads at a time.

torch's attention with dropout passes over all scores of a batch `[rows, heads, length, length]` a dozen times, in main
memory. Here the scores of a few heads stay in the processor's cache from the product of queries and keys to the product
with the values, and padding is not computed. The formula is that of Vaswani et al. 2017, section 3.2.1, with dropout on
the probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qa_deepspeed.models.attention.cpu_dropout import KeepMasks

Spans = Sequence[tuple[int, int, int]]
"""Row, first and last + 1 token of each span of tokens that attend to each other. Spans do not overlap, those of a row
come in order. A padded row holds one, a row of packed ones many."""

SCORES_AT_ONCE = 250_000
"""Attention scores that are computed together: 1 MB in float32, half of a usual second-level cache."""


def dropped_attention(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float, dropout: float) -> Tensor:
    """Attention with dropout on the probabilities within each span of tokens, `[rows, length, heads, width]`.

    Tokens that no span holds get zeros.

    Args:
        query, key, value: `[rows, heads, length, width]`. dropout: above 0, below 1.
    """
    output: Tensor = _DroppedAttention.apply(query, key, value, spans, scale, dropout)  # type: ignore[no-untyped-call]
    return output


def _rows(spans: Spans, heads: int) -> list[tuple[int, slice, int]]:
    """(row, its tokens, number of heads that are computed together) of every span."""
    together = [max(1, min(heads, SCORES_AT_ONCE // max(1, (end - begin) ** 2))) for _, begin, end in spans]
    return [(row, slice(begin, end), some) for (row, begin, end), some in zip(spans, together, strict=True)]


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
    """`values` `[rows, length, ...]` with zeros at tokens of no span; the other places are not set."""
    reached = [0] * len(values)
    for row, begin, end in spans:
        values[row, reached[row] : begin] = 0
        reached[row] = end
    for row, end in enumerate(reached):
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
