"""Array arithmetic of windows: where they start, which hold an answer, how ragged rows are gathered. Numpy only.

Shapes: `[texts]`, `[tokens]` and so on name the axis; "splits" of n ragged rows are n + 1 offsets into their tokens.
"""

from __future__ import annotations

import numpy as np


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers starts[i], starts[i] + 1, ... (counts[i] of them) for all i, one after another.

    Args: starts, counts: int arrays `[rows]`. Returns int64 `[sum(counts)]`.
    """
    counts = np.asarray(counts, dtype=np.int64)
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(np.asarray(starts, dtype=np.int64) - (ends - counts), counts) + np.arange(total, dtype=np.int64)


def splits_of(counts: np.ndarray) -> np.ndarray:
    """Row boundaries int64 `[rows + 1]` of ragged rows with these token counts `[rows]`."""
    splits = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=splits[1:])
    return splits


def cut_windows(
    context_lengths: np.ndarray, rooms: np.ndarray, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut each context into windows, as a tokenizer with truncation and overflow does.

    Windows start at 0, step, 2 * step, ...; each takes at most `room` tokens; the first that reaches the end of the
    context is the last. A context without tokens has none.

    Args: int arrays `[examples]`: tokens of the context, tokens of it that fit one window (>= 1), tokens between the
        starts of neighbouring windows (1 <= step <= room).
    Returns: int64 arrays `[windows]`: index of the example, first context token, number of context tokens.
    """
    lengths = np.asarray(context_lengths, dtype=np.int64)
    assert (rooms >= 1).all() and (steps >= 1).all() and (steps <= rooms).all()
    counts = np.where(lengths > 0, 1 + -(-np.maximum(lengths - rooms, 0) // steps), 0)
    example = np.repeat(np.arange(len(lengths), dtype=np.int64), counts)
    begin = ranges(np.zeros(len(counts), dtype=np.int64), counts) * steps[example]
    return example, begin, np.minimum(rooms[example], lengths[example] - begin)


def covering_tokens(
    token_begin: np.ndarray,
    token_end: np.ndarray,
    splits: np.ndarray,
    text: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The smallest span of tokens that covers the characters [begin, end) of a text, for many spans at once.

    It reaches from the first to the last token that overlaps the characters; both are inside. Characters without a
    token (blanks, control characters) at the edges of a span cannot be covered and are not asked for.

    Args: token_begin, token_end int `[tokens]`: character offsets of each token in its text; splits int64
        `[texts + 1]`; text, begin, end int `[spans]`: index of the text and the characters.
    Returns: int64 `[spans]` twice: first and last token, counted from the start of the text; (0, -1) where no token
        overlaps the span.
    """
    text = np.asarray(text, dtype=np.int64)
    if len(token_end) == 0 or len(text) == 0:
        return np.zeros(len(text), dtype=np.int64), np.full(len(text), -1, dtype=np.int64)
    # One sorted key over all texts: offsets of text i are moved past those of text i - 1. Offsets within a text may go
    # back a little (normalizers reorder combining marks); running extrema keep "first" and "last" exact then.
    gap = int(max(token_end.max(), np.max(end))) + 1
    shift = np.repeat(np.arange(len(splits) - 1, dtype=np.int64) * gap, np.diff(splits))
    ends = np.maximum.accumulate(token_end + shift)
    begins = np.minimum.accumulate((token_begin + shift)[::-1])[::-1]
    first = np.maximum(np.searchsorted(ends, text * gap + begin, side="right"), splits[text]) - splits[text]
    last = np.minimum(np.searchsorted(begins, text * gap + end, side="left") - 1, splits[text + 1] - 1) - splits[text]
    found = first <= last
    return np.where(found, first, 0), np.where(found, last, -1)
