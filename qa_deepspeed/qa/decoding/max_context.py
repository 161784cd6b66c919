"""The window that gives a token most context, where the windows of one context overlap.

Rule: `_check_is_max_context` in run_squad.py of https://github.com/google-research/bert: the context on a token's
poorer side counts, and a window's length a little (0.01 a token); of equals the first window wins.
"""

from __future__ import annotations

import numpy as np

LENGTH_SHARE = 0.01


def best_window_ranges(example: np.ndarray, begin: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of each window for which it is the best of its example's windows; they are always neighbours.

    Args:
        example, begin, length: int `[windows]`: whose window it is (those of one example adjacent), its first context
            token and its number of context tokens.

    Returns:
        int64 `[windows]` twice: first and last + 1, counted from the window's first token; equal where there is none.
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
    score = np.where((left >= 0) & (right >= 0), np.minimum(left, right) + LENGTH_SHARE * length[:, None], -np.inf)
    mine = score.argmax(axis=0) == np.arange(len(begin))[:, None]
    first = mine.argmax(axis=1)
    return first - begin, first - begin + mine.sum(axis=1)
