"""Order belongs to the global batch; ranks and accumulation only cut it up; padding keeps every position right."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_deepspeed.qa.features.batching import DUMMY_ROW, Layout, Packing, make_batch
from qa_deepspeed.qa.features.sampler import (
    balanced_micro_batches,
    balanced_micro_batches_by_tokens,
    epoch_order,
    evaluation_batches,
    micro_batches,
    micro_batches_by_tokens,
    padded_length,
)
from qa_deepspeed.qa.features.store import FeatureRows

LENGTHS = np.random.default_rng(0).integers(10, 385, 5000).astype(np.int32)


@given(rows=st.integers(1, 300), global_rows=st.integers(1, 40), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_an_epoch_holds_every_row_once(rows: int, global_rows: int, seed: int, epoch: int) -> None:
    order = epoch_order(LENGTHS[:rows], global_rows, seed, epoch)
    assert sorted(np.concatenate(order)) == list(range(rows))
    assert [len(step) for step in order[:-1]] == [global_rows] * (len(order) - 1)


def test_the_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    first = epoch_order(LENGTHS, 16, 1, 0)
    assert all(np.array_equal(a, b) for a, b in zip(first, epoch_order(LENGTHS, 16, 1, 0), strict=True))
    assert not np.array_equal(first[0], epoch_order(LENGTHS, 16, 1, 1)[0])
    assert not np.array_equal(first[0], epoch_order(LENGTHS, 16, 2, 0)[0])


def test_rows_of_a_step_are_near_in_length_and_steps_are_in_random_order() -> None:
    order = epoch_order(LENGTHS, 16, 1, 0)[:-1]
    padding = 1 - sum(LENGTHS[step].sum() for step in order) / sum(16 * LENGTHS[step].max() for step in order)
    assert padding < 0.05
    longest = np.array([LENGTHS[step].max() for step in order])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2


@given(rows=st.integers(1, 64), world_size=st.integers(1, 5), accumulation=st.integers(1, 5))
def test_micro_batches_cut_a_step_into_its_rows(rows: int, world_size: int, accumulation: int) -> None:
    parts = [micro_batches(np.arange(rows), rank, world_size, accumulation) for rank in range(world_size)]
    assert all(len(part) == accumulation for part in parts)
    assert sorted(np.concatenate([rows for part in parts for rows in part])) == list(range(rows))
    sizes = [len(rows) for part in parts for rows in part]
    assert max(sizes) - min(sizes) <= 2


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_no_rank_always_gets_the_longer_rows(world_size: int) -> None:
    lengths = np.arange(300, 300 - 4 * world_size, -1)  # each row a token shorter than the one before
    shares = [micro_batches(np.arange(4 * world_size), rank, world_size, 1)[0] for rank in range(world_size)]
    assert len({int(lengths[share].sum()) for share in shares}) == 1


@given(rows=st.integers(1, 200), size=st.integers(1, 16))
def test_evaluation_micro_batches_do_not_depend_on_the_ranks(rows: int, size: int) -> None:
    whole = {tuple(batch) for batch in evaluation_batches(LENGTHS[:rows], size, 0, 1)}
    for world_size in (2, 3, 4):
        shares = [evaluation_batches(LENGTHS[:rows], size, rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        assert {tuple(batch) for share in shares for batch in share if len(batch)} == whole


def rows_of(lengths: list[int]) -> FeatureRows:
    """Rows whose ids count from 100, with a null position at 0, a context from 2 on, an answer at 3..4."""
    splits = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.concatenate([np.arange(100, 100 + length) for length in lengths]).astype(np.int32)

    def everywhere(value: int) -> np.ndarray:
        return np.full(len(lengths), value, np.int32)

    return FeatureRows(
        np.arange(len(lengths)),
        splits,
        ids,
        np.ones(len(ids), np.int8),
        everywhere(3),
        everywhere(4),
        everywhere(0),
        everywhere(2),
        np.array(lengths, np.int32),
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_shifts_positions_with_the_tokens(side: str) -> None:
    columns = frozenset({"token_type_ids", "langs"})
    layout = Layout(pad_token_id=9, pad_type_id=3, padding_side=side, columns=columns, lang_id=5)
    batch = make_batch(lambda rows: rows_of([6, 11]), np.arange(2), layout)
    assert batch.inputs["input_ids"].shape == (2, 16)  # the next multiple of 8
    for row, length in enumerate([6, 11]):
        real = batch.inputs["attention_mask"][row].bool()
        assert batch.inputs["input_ids"][row][real].tolist() == list(range(100, 100 + length))
        assert set(batch.inputs["input_ids"][row][~real].tolist()) == {9}
        assert set(batch.inputs["token_type_ids"][row][~real].tolist()) == {3}
        assert batch.inputs["input_ids"][row, batch.start[row]] == 103
        assert batch.inputs["input_ids"][row, batch.null_position[row]] == 100
        assert batch.inputs["input_ids"][row, batch.context_begin[row]] == 102
        assert int(batch.context_end[row] - batch.shift[row]) == length
    assert set(batch.inputs["langs"].flatten().tolist()) == {5}
    assert batch.tokens == 17


def test_columns_a_model_does_not_take_are_not_sent() -> None:
    layout = Layout(pad_token_id=0, pad_type_id=0, padding_side="right", columns=frozenset({"input_ids"}))
    assert set(make_batch(lambda rows: rows_of([4]), np.arange(1), layout).inputs) == {"input_ids", "attention_mask"}


def test_an_empty_share_becomes_a_row_without_weight() -> None:
    layout = Layout(pad_token_id=0, pad_type_id=0, padding_side="right", columns=frozenset())
    batch = make_batch(lambda rows: rows_of([4] * len(rows)), np.arange(0), layout)
    assert batch.weight.tolist() == [0.0] and batch.feature_id.tolist() == [DUMMY_ROW] and batch.tokens == 0


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 96), min_size=1, max_size=60),
    world_size=st.integers(1, 5),
    max_tokens=st.integers(96, 1000),
)
def test_micro_batches_by_tokens_hold_every_row_once_and_no_more_than_the_budget(lengths, world_size, max_tokens):
    lengths = np.array(lengths)
    step_rows = np.argsort(-lengths, kind="stable")
    shares = [micro_batches_by_tokens(step_rows, lengths, rank, world_size, max_tokens) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1, "all ranks make the same number of forwards"
    assert sorted(np.concatenate([part for share in shares for part in share]).tolist()) == list(range(len(lengths)))
    for part in (part for share in shares for part in share if len(part)):
        assert len(part) * padded_length(int(lengths[part].max())) <= max_tokens


def test_without_grouping_a_step_is_a_uniform_sample_sorted_by_length() -> None:
    """Lengths in a step spread as in the whole set, not as in a bucket of similar ones."""
    order = epoch_order(LENGTHS, 16, 1, 0, group_by_length=False)
    assert sorted(np.concatenate(order)) == list(range(len(LENGTHS)))
    assert [len(step) for step in order[:-1]] == [16] * (len(order) - 1)
    assert all((np.diff(LENGTHS[step]) <= 0).all() for step in order)
    spread = np.mean([LENGTHS[step].std() for step in order[:-1]])
    assert spread > 0.9 * LENGTHS.std()
    assert np.mean([LENGTHS[step].std() for step in epoch_order(LENGTHS, 16, 1, 0)[:-1]]) < 0.2 * LENGTHS.std()
    assert not np.array_equal(order[0], epoch_order(LENGTHS, 16, 1, 1, group_by_length=False)[0])


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 96), min_size=1, max_size=80),
    world_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
)
def test_balanced_micro_batches_hold_every_row_once_and_no_more_tokens_than_the_longest_rows(
    lengths: list[int], world_size: int, accumulation: int
) -> None:
    """The bound that memory is planned by: as many rows on average, all as long as the longest."""
    sizes = np.array(lengths)
    step_rows = np.argsort(-sizes, kind="stable")
    shares = [balanced_micro_batches(step_rows, sizes, rank, world_size, accumulation) for rank in range(world_size)]
    assert all(len(share) == accumulation for share in shares)
    parts = [part for share in shares for part in share]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(sizes)))
    rows = -(-len(sizes) // (world_size * accumulation))
    tokens = [int(sizes[part].sum()) for part in parts]
    assert max(tokens) <= rows * sizes.max()
    if len(sizes) >= len(parts):
        assert max(tokens) - min(tokens) <= sizes.max()


def test_balanced_micro_batches_of_random_steps_are_nearly_even() -> None:
    """16 rows on two ranks: 1.008 times the mean, as measured on SQuAD's lengths; in any order 1.08."""
    loads = []
    for step in epoch_order(LENGTHS, 16, 3, 0, group_by_length=False)[:100]:
        tokens = [LENGTHS[balanced_micro_batches(step, LENGTHS, rank, 2, 1)[0]].sum() for rank in range(2)]
        loads.append(max(tokens) / np.mean(tokens))
    assert np.mean(loads) < 1.02


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 96), min_size=1, max_size=60),
    world_size=st.integers(1, 5),
    max_tokens=st.integers(96, 1000),
)
def test_balanced_micro_batches_by_tokens_keep_the_limit(lengths: list[int], world_size: int, max_tokens: int) -> None:
    sizes = np.array(lengths)
    step_rows = np.argsort(-sizes, kind="stable")
    shares = [
        balanced_micro_batches_by_tokens(step_rows, sizes, rank, world_size, max_tokens) for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    parts = [part for share in shares for part in share]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(sizes)))
    assert all(sizes[part].sum() <= max_tokens for part in parts)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(6, 60), min_size=1, max_size=8), fill=st.sampled_from([1, 8, 64]))
def test_packed_rows_are_the_rows_end_to_end(lengths: list[int], fill: int) -> None:
    layout = Layout(9, 3, "left", frozenset({"token_type_ids"}), packing=Packing(first_position=2, token_multiple=fill))
    batch = make_batch(lambda rows: rows_of(lengths), np.arange(len(lengths)), layout)
    total, ids = sum(lengths), batch.inputs["input_ids"]
    assert ids.shape == (1, -(-total // fill) * fill) and batch.tokens == total
    assert set(ids[0, total:].tolist()) <= {9} and set(batch.inputs["token_type_ids"][0, total:].tolist()) <= {3}
    assert "attention_mask" not in batch.inputs
    bounds = batch.inputs["cu_seq_lens_q"].tolist()
    assert bounds[: len(lengths) + 1] == [0, *np.cumsum(lengths)] and bounds[-1] == ids.shape[1]
    assert batch.inputs["max_length_q"] >= max(np.diff(bounds))
    for row, length in enumerate(lengths):
        begin = bounds[row]
        assert ids[0, begin : begin + length].tolist() == list(range(100, 100 + length))
        assert batch.inputs["position_ids"][0, begin : begin + length].tolist() == list(range(2, 2 + length))
        assert batch.place[row, :length].tolist() == list(range(begin, begin + length))
        assert batch.place[row, int(batch.start[row])] == begin + 3
    assert batch.shift.tolist() == [0] * len(lengths) and batch.length.tolist() == lengths
