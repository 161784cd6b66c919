"""The rows of an epoch of a mixture: as many of each file as its weight says, the same in every run."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qa_deepspeed.qa.features.mixture import epoch_size, rows_of_epoch

ROWS = np.array([10, 40, 7])


def counts(weights: tuple[float, ...], epoch: int = 0, seed: int = 1) -> np.ndarray:
    """How often each of the 57 rows occurs."""
    return np.bincount(rows_of_epoch(ROWS, weights, seed, epoch), minlength=int(ROWS.sum()))


def test_a_whole_weight_takes_every_row_so_often() -> None:
    assert counts((1, 2, 3)).tolist() == [1] * 10 + [2] * 40 + [3] * 7


def test_a_fraction_draws_a_part_anew_for_each_epoch() -> None:
    first, second = counts((0.5, 1.25, 1), epoch=0), counts((0.5, 1.25, 1), epoch=1)
    for found in (first, second):
        assert found[:10].sum() == 5 and found[:10].max() == 1
        assert found[10:50].sum() == 50 and (found[10:50].min(), found[10:50].max()) == (1, 2)
        assert found[50:].tolist() == [1] * 7
    assert (first[:10] != second[:10]).any() and (first[10:50] != second[10:50]).any()
    over_epochs = sum(counts((0.5, 1, 1), epoch)[:10] for epoch in range(200))
    assert over_epochs.min() > 60 and over_epochs.max() < 140


def test_the_rows_depend_on_seed_and_epoch_alone() -> None:
    weights = (0.5, 0.1, 0.3)
    again = [rows_of_epoch(ROWS, weights, 3, epoch) for epoch in (4, 2, 4)]
    assert np.array_equal(again[0], again[2]) and not np.array_equal(again[0], again[1])
    assert not np.array_equal(again[0], rows_of_epoch(ROWS, weights, 4, 4))


def test_the_draw_of_a_file_does_not_depend_on_the_others() -> None:
    assert np.array_equal(counts((0.5, 1, 1))[:10], counts((0.5, 3, 0.2))[:10])


def test_a_small_weight_takes_at_least_one_row_and_an_empty_file_none() -> None:
    assert rows_of_epoch(np.array([5, 0, 9]), (1e-9, 2.0, 1.0), 0, 0).tolist()[1:] == list(range(5, 14))
    assert epoch_size(np.array([5, 0, 9]), (1e-9, 2.0, 1.0)) == 10
    assert epoch_size(np.array([5, 0, 9]), None) == 14


@given(
    files=st.lists(st.tuples(st.integers(0, 50), st.floats(0.01, 5)), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 10**6),
)
def test_every_epoch_has_the_size_that_is_planned(files: list[tuple[int, float]], seed: int, epoch: int) -> None:
    sizes, weights = np.array([rows for rows, _ in files]), [weight for _, weight in files]
    rows = rows_of_epoch(sizes, weights, seed, epoch)
    assert len(rows) == epoch_size(sizes, weights)
    assert len(rows) == 0 or 0 <= rows.min() <= rows.max() < sizes.sum()
    found = np.bincount(rows, minlength=int(sizes.sum()))
    for begin, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
        part = found[begin : begin + size]
        assert size == 0 or part.max() - part.min() <= 1
