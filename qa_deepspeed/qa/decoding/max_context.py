"""The "max context" rule: which of several overlapping windows gives a token most context.

Rule: `_check_is_max_context` in run_squad.py of https://github.com/google-research/bert. A window's score for a token
is the smaller of its context to the left and to the right, plus 0.01 per token of the window; the first window wins
ties.
"""

from __future__ import annotations

import numpy as np

LENGTH_WEIGHT = 0.01


def best_window_ranges(example: np.ndarray, begin: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of each window for which it is the best of its example's windows; they are always contiguous.

    Args:
        example, begin, length: int `[windows]`: the window's example (windows of one example adjacent), its first
            context token and its number of context tokens.

    Returns:
        int64 `[windows]` twice: first and last + 1, counted from the window's first token; equal for an empty range.
    """
    first, stop = np.zeros(len(begin), np.int64), np.asarray(length, np.int64).copy()
    ends = np.append(np.flatnonzero(example[1:] != example[:-1]) + 1, len(example))
    starts = np.append(0, ends[:-1])
    for one in np.flatnonzero(ends - starts > 1):
        windows = slice(starts[one], ends[one])
        first[windows], stop[windows] = _ranges_of_one(begin[windows], stop[windows])
    return first, stop


def _ranges_of_one(begin: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    begin = np.asarray(begin, np.int64)
    token = np.arange(int((begin + length).max()))
    left, right = token - begin[:, None], (begin + length - 1)[:, None] - token
    score = np.where((left >= 0) & (right >= 0), np.minimum(left, right) + LENGTH_WEIGHT * length[:, None], -np.inf)
    best_here = score.argmax(axis=0) == np.arange(len(begin))[:, None]
    first = best_here.argmax(axis=1)
    return first - begin, first - begin + best_here.sum(axis=1)
