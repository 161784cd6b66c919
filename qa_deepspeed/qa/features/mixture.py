"""Mixtures: the rows of an epoch where the files of the training data have weights.

A weight says how often the rows of a file count in an epoch: 2 takes each row twice, 0.5 draws half of them anew for
each epoch, 1.5 takes all once and half of them a second time. The rows of an epoch are a function of seed and epoch
alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rows_of_epoch(rows_by_file: np.ndarray, weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch, int64 `[rows]`, file by file; a row may be there several times.

    Args:
        rows_by_file: `[files]` number of rows of each file; those of a file are adjacent, in the order of the files.
        weights: of each file.
    """
    parts = [np.zeros(0, dtype=np.int64)]
    begin = 0
    for number, (rows, weight) in enumerate(zip(rows_by_file.tolist(), weights, strict=True)):
        times, rest = divmod(_taken(rows, weight), rows) if rows else (0, 0)
        parts += [np.arange(begin, begin + rows)] * times
        if rest:
            random = np.random.default_rng((seed, epoch, number + 1))  # of its own: other files change nothing
            parts.append(begin + np.sort(random.choice(rows, rest, replace=False)))
        begin += rows
    return np.concatenate(parts)


def epoch_size(rows_by_file: np.ndarray, weights: Sequence[float] | None) -> int:
    """The number of rows of every epoch; without weights every row counts once."""
    if weights is None:
        return int(rows_by_file.sum())
    return sum(_taken(rows, weight) for rows, weight in zip(rows_by_file.tolist(), weights, strict=True))


def _taken(rows: int, weight: float) -> int:
    """Rows that a file contributes to an epoch: a file that has some contributes at least one."""
    return max(1, round(rows * weight)) if rows else 0
