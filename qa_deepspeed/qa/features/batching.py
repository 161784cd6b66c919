"""Which rows make up which batch, and how rows become padded tensors.

Order belongs to the global batch: the rows of optimizer step k are a function of (seed, epoch, k, global batch) alone;
ranks and accumulation only cut that list up. `rank` and `world_size` are plain integers here: no communication.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from qa_deepspeed.qa.features.store import FeatureRows

LENGTH_MULTIPLE = 8
"""Rows are padded to a multiple of this many tokens: efficient on tensor cores, and fewer shapes."""

BUCKET_BATCHES = 50
"""Global batches whose rows are sorted by length together: enough for little padding, few enough to stay random."""

DUMMY_ROW = -1
"""Feature id of a row that only makes the ranks' work equal."""


def epoch_order(lengths: np.ndarray, global_rows: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The sampler: the rows of every optimizer step of an epoch. Rows of one step have similar lengths.

    The rows are shuffled, cut into buckets of `BUCKET_BATCHES` global batches, sorted by length inside each bucket and
    cut into global batches, which are shuffled over the whole epoch. The remainder is drawn before the sorting, so the
    last, partial batch is a random sample of all lengths.

    Args:
        lengths: `[features]` tokens of each row.
        global_rows: rows of one optimizer step over all ranks.

    Returns:
        One int64 array of row numbers per step, each sorted from long to short; all but the last hold `global_rows`.
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    whole = len(order) // global_rows * global_rows
    batches: list[np.ndarray] = []
    for begin in range(0, whole, BUCKET_BATCHES * global_rows):
        window = order[begin : min(begin + BUCKET_BATCHES * global_rows, whole)]
        window = window[np.argsort(-lengths[window], kind="stable")]
        batches += list(window.reshape(-1, global_rows))
    batches = [batches[index] for index in random.permutation(len(batches))]
    if whole < len(order):
        rest = order[whole:]
        batches.append(rest[np.argsort(-lengths[rest], kind="stable")])
    return batches


def micro_batches(step_rows: np.ndarray, rank: int, world_size: int, accumulation: int) -> list[np.ndarray]:
    """One rank's micro-batches of a step: `accumulation` arrays of rows.

    The step's rows (long to short) are first cut into micro-steps, so that the ranks work on rows of similar length at
    the same time, then assigned to the ranks. A partial batch is spread as evenly as possible; an array may be empty.
    """
    return [_rows_of_rank(part, rank, world_size) for part in np.array_split(step_rows, accumulation)]


def _rows_of_rank(rows: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Assign length-sorted rows to ranks in serpentine order, so that no rank always gets the longer row."""
    turn, place = np.divmod(np.arange(len(rows)), world_size)
    mine: np.ndarray = rows[np.where(turn % 2 == 0, place, world_size - 1 - place) == rank]
    return mine


def micro_batches_by_tokens(
    step_rows: np.ndarray, lengths: np.ndarray, rank: int, world_size: int, max_tokens: int
) -> list[np.ndarray]:
    """One rank's rows of a step, in as few micro-batches of at most `max_tokens` padded tokens as the order allows.

    All ranks get the same number; in the last ones an array may be empty.

    Args:
        step_rows: the step's rows, long to short. lengths: `[features]` tokens of each row, at most max_tokens.
    """
    parts, begin = [], 0
    while begin < len(step_rows):
        height = max(1, max_tokens // padded_length(int(lengths[step_rows[begin]]))) * world_size
        parts.append(_rows_of_rank(step_rows[begin : begin + height], rank, world_size))
        begin += height
    return parts


def padded_length(longest: int) -> int:
    """The length that a micro-batch whose longest row has this many tokens is padded to."""
    return -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def evaluation_batches(lengths: np.ndarray, rows: int, rank: int, world_size: int) -> list[np.ndarray]:
    """One rank's micro-batches of the whole evaluation set; every rank gets the same number.

    They are cut from the whole set in order of length, long first, and assigned whole: the arithmetic of a micro-batch
    does not depend on the number of ranks. Ranks that have fewer get empty arrays (dummy rows).
    """
    order = np.argsort(-lengths, kind="stable")
    batches = [order[begin : begin + rows] for begin in range(0, len(order), rows)]
    batches += [order[:0]] * (-len(batches) % world_size)
    return batches[rank::world_size]


@dataclass(frozen=True)
class Layout:
    """How a model wants its rows padded, and which inputs it takes."""

    pad_token_id: int
    pad_type_id: int
    padding_side: str
    columns: frozenset[str]
    lang_id: int = 0


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch. Positions (`[rows]`, int64) count from the left end of the padded row."""

    inputs: dict[str, torch.Tensor]  # each [rows, length]
    start: torch.Tensor
    end: torch.Tensor
    gold_starts: torch.Tensor  # [rows, golds], -1 fills: all gold spans if the features keep them, else start and end
    gold_ends: torch.Tensor
    null_position: torch.Tensor
    context_begin: torch.Tensor
    context_end: torch.Tensor
    shift: torch.Tensor  # padding left of each row; subtract it for positions in the unpadded row
    weight: torch.Tensor  # float32 [rows]: 1, or 0 for a dummy row
    feature_id: np.ndarray  # int64 [rows], DUMMY_ROW for a dummy row
    tokens: int  # real ones, without padding and dummy rows

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        if device.type == "cpu":
            return self

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            {name: move(tensor) for name, tensor in self.inputs.items()},
            move(self.start),
            move(self.end),
            move(self.gold_starts),
            move(self.gold_ends),
            move(self.null_position),
            move(self.context_begin),
            move(self.context_end),
            move(self.shift),
            move(self.weight),
            self.feature_id,
            self.tokens,
        )


def make_batch(take: Callable[[np.ndarray], FeatureRows], rows: np.ndarray, layout: Layout) -> Batch:
    """Collate: pad the rows to one length. An empty `rows` gives one dummy row (a copy of row 0 with weight 0)."""
    dummy = len(rows) == 0
    features = take(rows if not dummy else np.zeros(1, np.int64))
    lengths = np.diff(features.row_splits)
    length = padded_length(int(lengths.max()))
    shift = length - lengths if layout.padding_side == "left" else np.zeros_like(lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)
    column = np.arange(len(features.input_ids)) - np.repeat(features.row_splits[:-1] - shift, lengths)

    def padded(values: np.ndarray | int, fill: int) -> torch.Tensor:
        block = np.full((len(lengths), length), fill, np.int64)
        block[row, column] = values
        return torch.from_numpy(block)

    inputs = {"input_ids": padded(features.input_ids, layout.pad_token_id), "attention_mask": padded(1, 0)}
    if "token_type_ids" in layout.columns and features.token_type_ids is not None:
        inputs["token_type_ids"] = padded(features.token_type_ids, layout.pad_type_id)
    if "langs" in layout.columns:
        inputs["langs"] = torch.full_like(inputs["input_ids"], layout.lang_id)

    def position(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((values + shift).astype(np.int64))

    start, end = position(features.start), position(features.end)
    return Batch(
        inputs,
        start,
        end,
        *_golds(features, shift, start, end),
        position(features.null_position),
        position(features.context_begin),
        position(features.context_end),
        torch.from_numpy(shift.astype(np.int64)),
        torch.full((len(lengths),), 0.0 if dummy else 1.0),
        np.full(1, DUMMY_ROW, np.int64) if dummy else features.feature_id,
        0 if dummy else len(features.input_ids),
    )


def _golds(
    features: FeatureRows, shift: np.ndarray, start: torch.Tensor, end: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """All gold spans of each row, `[rows, golds]` twice; the label of a row that holds none is its only one."""
    if features.gold_splits is None or features.gold_starts is None or features.gold_ends is None:
        return start.unsqueeze(1), end.unsqueeze(1)
    counts = np.diff(features.gold_splits)
    row = np.repeat(np.arange(len(counts)), counts)
    column = np.arange(len(row)) - np.repeat(features.gold_splits[:-1], counts)
    blocks = []
    for golds, label in ((features.gold_starts, start), (features.gold_ends, end)):
        block = np.full((len(counts), max(1, int(counts.max(initial=0)))), -1, np.int64)
        block[:, 0] = label.numpy()
        block[row, column] = golds + shift[row]
        blocks.append(torch.from_numpy(block))
    return blocks[0], blocks[1]
