"""The loss where only some positions are allowed: smoothing, precision, and spans that tie."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qa_deepspeed.qa.decoding.spans import answer_positions, best_spans, span_loss


def by_hand(logits: list[float], target: int, allowed: list[int], smoothing: float) -> float:
    """Cross-entropy over the allowed positions, `smoothing` of the target spread evenly over them; in float64."""
    values = np.array([logits[place] for place in allowed], np.float64)
    log_p = values - np.log(np.exp(values - values.max()).sum()) - values.max()
    return float(-(1 - smoothing) * log_p[allowed.index(target)] - smoothing * log_p.mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_loss_is_over_the_allowed_positions_in_float32(smoothing: float, kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    start_logits, end_logits = (torch.randn(2, 4, 40, generator=generator) * 4).to(kind)
    begin, stop, null = torch.tensor([5, 1, 30, 3]), torch.tensor([30, 2, 40, 39]), torch.tensor([0, 0, 0, 39])
    start, end = torch.tensor([7, 1, 0, 39]), torch.tensor([9, 1, 0, 39])
    allowed = answer_positions(begin, stop, null, 40)
    found = span_loss(start_logits, end_logits, start, end, allowed, smoothing)
    assert found.dtype == torch.float32
    for row in range(4):
        places = sorted({int(null[row]), *range(int(begin[row]), int(stop[row]))})
        pairs = ((start_logits, start), (end_logits, end))
        expected = [by_hand(logits[row].tolist(), int(place[row]), places, smoothing) for logits, place in pairs]
        assert float(found[row]) == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_zeros_of_both_signs_tie() -> None:
    """The first of equal spans wins, though one score is -0.0 + -0.0 and the other 0.0."""
    start, end = torch.tensor([[-0.0, 0.0, 0.0, -0.0]]), torch.tensor([[-0.0, 0.0, -0.0, -0.0]])
    limits = torch.tensor([0]), torch.tensor([4]), torch.tensor([4])
    found = best_spans(start, end, *limits, 10, 4)
    pairs = list(zip(found[0][0].tolist(), found[1][0].tolist(), strict=True))
    assert pairs == [(first, last) for first in range(4) for last in range(first, 4)]
