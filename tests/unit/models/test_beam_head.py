"""The beam head's labels, mask and spans, on numbers made here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qa_deepspeed.models.heads import BeamHead, best_beam_spans
from qa_deepspeed.qa.features.batching import Layout, make_batch
from tests.unit.qa.features.test_batching import rows_of


@pytest.mark.parametrize("max_length", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_spans_are_the_valid_pairs_by_probability(seed: int, max_length: int) -> None:
    random = np.random.default_rng(seed)
    start = np.stack([random.permutation(12)[:4] for _ in range(2)])
    end = random.integers(0, 12, (2, 5, 4))  # [rows, end_n_top, start_n_top]
    start_p, end_p = random.integers(1, 5, (2, 4)) / 8, random.integers(1, 5, (2, 5, 4)) / 8
    first, stop, context_end = 2, 9, 11
    arguments = [torch.from_numpy(part) for part in (start, start_p, end.reshape(2, -1), end_p.reshape(2, -1))]
    limits = (torch.full((2,), first), torch.full((2,), stop))
    found = best_beam_spans(*arguments, limits, torch.full((2,), context_end), 50, max_length)
    for row in range(2):
        pairs = [
            (-start_p[row, s] * end_p[row, e, s], int(start[row, s]), int(end[row, e, s]))
            for s in range(4)
            for e in range(5)
            if first <= start[row, s] < stop and start[row, s] <= end[row, e, s] < context_end
        ]
        expected = [pair for pair in sorted(pairs) if pair[2] - pair[1] < max_length]
        places = [place for place in zip(found[0][row].tolist(), found[1][row].tolist(), strict=True) if place[0] >= 0]
        assert sorted(places) == sorted((begin, last) for _, begin, last in expected)
        scores = (found[2][row] + found[3][row])[: len(expected)].tolist()
        assert scores == pytest.approx([math.log(-pair[0]) for pair in expected], abs=1e-5)


def test_the_label_of_an_unanswerable_row_is_1() -> None:
    rows = rows_of([6, 11])
    rows.start[1] = rows.end[1] = 0  # the null position
    layout = Layout(pad_token_id=9, pad_type_id=0, padding_side="left", columns=frozenset())
    batch = make_batch(lambda _: rows, np.arange(2), layout)
    inputs = BeamHead(torch.nn.Linear(2, 2), version_2_with_negative=True).training_inputs(batch)
    assert inputs["is_impossible"].tolist() == [0.0, 1.0]
    assert "is_impossible" not in BeamHead(torch.nn.Linear(2, 2), False).training_inputs(batch)
    assert inputs["start_positions"].tolist() == batch.start.tolist()
    for row in range(2):  # 1 where no answer can be: all but the null position (token 0) and the context (from 2 on)
        allowed = [int(batch.shift[row]) + token for token in range([6, 11][row]) if token != 1]
        assert (inputs["p_mask"][row] == 0).nonzero().flatten().tolist() == allowed
    assert inputs["cls_index"].tolist() == batch.shift.tolist()


def test_of_equal_probabilities_the_span_that_begins_first_comes_first() -> None:
    """Also where it ends later."""
    start, end = torch.tensor([[2, 1]]), torch.tensor([[[2, 3]]])  # [rows, end_n_top, start_n_top]
    half = torch.full((1, 2), 0.5)
    limits = (torch.zeros(1, dtype=torch.long), torch.full((1,), 9))
    found = best_beam_spans(start, half, end.reshape(1, -1), half, limits, torch.full((1,), 9), 2, 7)
    assert found[0].tolist() == [[1, 2]] and found[1].tolist() == [[3, 2]]
