"""All gold spans of a row move with its padding; the steps of an epoch come in random order."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qa_deepspeed.qa.features.batching import Layout, make_batch
from qa_deepspeed.qa.features.sampler import epoch_order
from tests.unit.qa.features.test_batching import rows_of


@pytest.mark.parametrize("side", ["left", "right"])
def test_all_gold_spans_move_with_the_padding(side: str) -> None:
    """Row 0 has two gold spans, row 1 none (its label is the null position), row 2 one."""
    rows = dataclasses.replace(
        rows_of([6, 11, 9]),
        start=np.array([3, 0, 5], np.int32),
        end=np.array([4, 0, 7], np.int32),
        gold_starts=np.array([3, 2, 5], np.int32),
        gold_ends=np.array([4, 5, 7], np.int32),
        gold_splits=np.array([0, 2, 2, 3]),
    )
    layout = Layout(pad_token_id=9, pad_type_id=0, padding_side=side, columns=frozenset())
    batch = make_batch(lambda _: rows, np.arange(3), layout)
    ids = batch.inputs["input_ids"]
    golds = [
        [
            (int(ids[row, first]), int(ids[row, last]))
            for first, last in zip(batch.gold_starts[row].tolist(), batch.gold_ends[row].tolist(), strict=True)
            if first >= 0
        ]
        for row in range(3)
    ]
    assert golds == [[(103, 104), (102, 105)], [(100, 100)], [(105, 107)]]
    assert [int(ids[row, batch.start[row]]) for row in range(3)] == [103, 100, 105]
    mask = batch.inputs["attention_mask"]
    assert mask.sum(1).tolist() == [6, 11, 9] and (mask[:, -1] == 1).all() == (side == "left")


def test_the_steps_of_an_epoch_are_not_sorted_by_length() -> None:
    """Rows are sorted by length within a window of steps, and the steps then shuffled over the whole epoch."""
    lengths = np.arange(10, 410)
    longest = [int(lengths[step].max()) for step in epoch_order(lengths, 8, seed=1, epoch=0)]
    assert len(longest) == 50 and longest != sorted(longest) and longest != sorted(longest, reverse=True)
    assert abs(np.corrcoef(longest, np.arange(50))[0, 1]) < 0.4


def test_the_partial_batch_is_a_random_sample_of_all_lengths() -> None:
    lengths = np.arange(10, 413)
    lasts = [lengths[epoch_order(lengths, 8, seed=seed, epoch=0)[-1]] for seed in range(20)]
    assert all(len(last) == 3 for last in lasts)
    assert len({tuple(last) for last in lasts}) == 20
    assert 150 < np.mean(lasts) < 270  # the mean of all is 211
