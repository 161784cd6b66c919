"""The sampler: which rows make up each optimizer step, and which rank works on them in which micro-batch.

Order belongs to the global batch: the rows of optimizer step k are a function of (seed, epoch, k, global batch) alone;
ranks and accumulation only cut that list up. `rank` and `world_size` are plain integers here: no communication.
"""

from __future__ import annotations

import heapq

import numpy as np

LENGTH_MULTIPLE = 8
"""Rows are padded to a multiple of this many tokens: efficient on tensor cores, and fewer shapes."""

BUCKET_BATCHES = 50
"""Global batches whose rows are sorted by length together: enough for little padding, few enough to stay random."""


def epoch_order(
    lengths: np.ndarray, global_rows: int, seed: int, epoch: int, group_by_length: bool = True
) -> list[np.ndarray]:
    """The rows of every optimizer step of an epoch, in random order; the last step may have fewer.

    With `group_by_length` the rows of one step have similar lengths: the shuffled rows are cut into buckets of
    `BUCKET_BATCHES` global batches, sorted by length inside each bucket and cut into global batches, which are shuffled
    over the whole epoch. The remainder is drawn before the sorting, so the last, partial batch is a random sample of
    all lengths. Without it every step is a uniform random sample of the rows.

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
        batches += list((_long_first(window, lengths) if group_by_length else window).reshape(-1, global_rows))
    if group_by_length:
        batches = [batches[index] for index in random.permutation(len(batches))]
    if whole < len(order):
        batches.append(order[whole:])
    return [_long_first(rows, lengths) for rows in batches]


def _long_first(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The rows from long to short; those of equal length keep their order."""
    ordered: np.ndarray = rows[np.argsort(-lengths[rows], kind="stable")]
    return ordered


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


def balanced_micro_batches(
    step_rows: np.ndarray, lengths: np.ndarray, rank: int, world_size: int, accumulation: int
) -> list[np.ndarray]:
    """One rank's micro-batches of a step, all of nearly the same number of tokens: `accumulation` arrays of rows.

    The longest row goes to the micro-batch with the fewest tokens so far, and so on (Graham 1969, longest processing
    time first). If each holds `rows` rows on average, none gets more tokens than `rows` of the longest have.

    Args:
        step_rows: the step's rows, long to short. lengths: `[features]` tokens of each row.
    """
    parts: list[list[int]] = [[] for _ in range(world_size * accumulation)]
    fewest = [(0, place) for place in range(len(parts))]
    for row in step_rows.tolist():
        tokens, place = heapq.heappop(fewest)
        parts[place].append(row)
        heapq.heappush(fewest, (tokens + int(lengths[row]), place))
    # adjacent places, which are filled one after another, go to different ranks
    return [np.array(parts[micro * world_size + rank], np.int64) for micro in range(accumulation)]


def balanced_micro_batches_by_tokens(
    step_rows: np.ndarray, lengths: np.ndarray, rank: int, world_size: int, max_tokens: int
) -> list[np.ndarray]:
    """One rank's rows of a step, in as few micro-batches of at most `max_tokens` tokens as dealing by size allows.

    Args:
        step_rows: the step's rows, long to short. lengths: `[features]` tokens of each row, at most max_tokens.
    """
    accumulation = max(1, -(-int(lengths[step_rows].sum()) // (max_tokens * world_size)))
    while True:
        shares = [
            balanced_micro_batches(step_rows, lengths, one, world_size, accumulation) for one in range(world_size)
        ]
        if all(lengths[rows].sum() <= max_tokens for share in shares for rows in share):
            return shares[rank]
        accumulation += 1


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
