"""Our attention for CPUs as Transformers calls it: the model's scaling, and probabilities in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qa_deepspeed.models.attention import row_attention
from qa_deepspeed.models.attention.cpu_dropout import KeepMasks

ROWS, HEADS, LENGTH, WIDTH = 2, 2, 9, 8
SPANS = torch.tensor([[0, 9], [0, 9]])


def expected(parts: list[torch.Tensor], scale: float, dropout: float, seed: int) -> torch.Tensor:
    """Attention by its definition, in float64, with the masks that the seed gives."""
    query, key, value = (part.double() for part in parts)
    probability = torch.softmax(query @ key.transpose(2, 3) * scale, dim=-1)
    if dropout:
        torch.manual_seed(seed)
        masks = KeepMasks(dropout)
        for row in range(ROWS):
            probability[row] *= masks.draw(HEADS, LENGTH, LENGTH) * masks.scale
    return (probability @ value).transpose(1, 2)


def attention(parts: list[torch.Tensor], scaling: float | None, dropout: float, seed: int) -> torch.Tensor:
    """The function that Transformers calls, for a layer that is not causal."""
    layer = nn.Module()
    layer.is_causal = False
    torch.manual_seed(seed)
    return row_attention._attention(layer, *parts, SPANS, scaling=scaling, dropout=dropout)[0]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("scaling", [None, 0.05, 1.0])
def test_the_models_own_scaling_counts(scaling: float | None, dropout: float) -> None:
    """T5 and MPNet do not scale by the root of the width; None is that root."""
    torch.manual_seed(0)
    parts = [torch.randn(ROWS, HEADS, LENGTH, WIDTH) for _ in range(3)]
    by_hand = expected(parts, WIDTH**-0.5 if scaling is None else scaling, dropout, seed=4)
    torch.testing.assert_close(attention(parts, scaling, dropout, seed=4).double(), by_hand, rtol=1e-4, atol=1e-5)


def test_probabilities_are_float32_where_values_are_bfloat16() -> None:
    """Those that are kept for the backward pass, and they add up to 1 as only float32 can."""
    torch.manual_seed(0)
    parts = [torch.randn(1, HEADS, 400, WIDTH).bfloat16().requires_grad_() for _ in range(3)]
    torch.manual_seed(1)
    output = row_attention._attention(nn.Module(), *parts, torch.tensor([[0, 400]]), scaling=1.0, dropout=0.5)[0]
    kept = [one for one in output.grad_fn.saved_tensors if one.shape[-2:] == (400, 400)]
    assert output.dtype == torch.bfloat16 and kept
    for probability in kept:
        assert probability.dtype == torch.float32
        torch.testing.assert_close(probability.sum(-1), torch.ones(probability.shape[:-1]), rtol=1e-5, atol=0)
