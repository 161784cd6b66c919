"""What the features of a training file say about it, as numbers. Numpy only; lengths are tokens.

Shapes: `[examples]` follows the order of the file, `[features]` that of the feature store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.qa.features.windows import cut_windows

ROWS_AT_ONCE = 4096
WHOLE_SHARE = 0.95
"""The suggested max_seq_length holds this fraction of the questions with their whole context in one window."""

SHARED_PART = 4
"""With the suggested doc_stride, neighbouring windows share at least one part in so many of their context."""

LENGTH_UNIT, STRIDE_UNIT = 32, 16
HISTOGRAM_EDGES = (64, 128, 192, 256, 320, 384, 512, 768, 1024, 2048, 4096, 8192)
QUANTILES = (0.5, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Sizes:
    """int64 arrays `[examples]`; all but `windows` are 0 for an example that has no window.

    windows: how many rows it makes. context: tokens of the whole context. beside: tokens of the question (cut to
    max_query_length) and the special tokens. answer: tokens of the labelled answer, 0 where no window holds one.
    """

    windows: np.ndarray
    context: np.ndarray
    beside: np.ndarray
    answer: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        """Tokens of a row with the whole context, `[examples]`."""
        tokens: np.ndarray = self.beside + self.context
        return tokens


def measure(store: FeatureStore, settings: FeatureSettings) -> Sizes:
    """The sizes of every example, from its windows (none of which may have been dropped)."""
    assert settings.windows_without_answer == "keep", "the length of a context is read off all its windows"
    window, beside, answer = (np.zeros(len(store), dtype=np.int64) for _ in range(3))
    for begin in range(0, len(store), ROWS_AT_ONCE):
        rows = store.take(np.arange(begin, min(begin + ROWS_AT_ONCE, len(store))))
        window[rows.feature_id] = rows.context_end - rows.context_begin
        beside[rows.feature_id] = np.diff(rows.row_splits) - window[rows.feature_id]
        answer[rows.feature_id] = np.where(rows.start == rows.null_position, 0, rows.end - rows.start + 1)
    examples = len(store.examples)
    windows = np.bincount(store.example_index, minlength=examples)
    cut = np.flatnonzero(windows)
    first = (np.cumsum(windows) - windows)[cut]
    last = first + windows[cut] - 1
    step = settings.doc_stride if settings.doc_stride_is == "step" else window[first] - settings.doc_stride
    sizes = Sizes(windows, *(np.zeros(examples, dtype=np.int64) for _ in range(3)))
    sizes.context[cut] = (windows[cut] - 1) * step + window[last]
    sizes.beside[cut] = beside[first]
    np.maximum.at(sizes.answer, store.example_index, answer)
    return sizes


def histogram(lengths: np.ndarray) -> list[dict[str, int | None]]:
    """Counts of lengths `[n]` in bins (more than `above`, at most `to`; the last has no end), without empty ends."""
    edges = [0, *HISTOGRAM_EDGES]
    counts = np.bincount(np.searchsorted(HISTOGRAM_EDGES, lengths), minlength=len(edges))
    used = np.flatnonzero(counts)
    bins: list[dict[str, int | None]] = []
    for index in range(used[0], used[-1] + 1) if len(used) else ():
        to = edges[index + 1] if index + 1 < len(edges) else None
        bins.append({"above": edges[index], "to": to, "questions": int(counts[index])})
    return bins


def quantiles(lengths: np.ndarray) -> dict[str, int]:
    """The lengths below or at which 50, 90, 95, 99 and 100 percent of them lie."""
    found = {f"{share:.0%}": int(_quantile(lengths, share)) for share in QUANTILES}
    return found | {"longest": int(lengths.max(initial=0))}


def _quantile(lengths: np.ndarray, share: float) -> float:
    return float(np.quantile(lengths, share, method="inverted_cdf")) if len(lengths) else 0.0


def suggest(sizes: Sizes, special_tokens: int, max_query_length: int, longest_row: int | None) -> dict[str, Any]:
    """max_seq_length and doc_stride (as step) that fit this file, and the windows and tokens they would make.

    The length is the least multiple of `LENGTH_UNIT` that holds `WHOLE_SHARE` of the questions with their whole
    context, and at most what the model takes. The stride is the largest multiple of `STRIDE_UNIT` with which
    neighbouring windows share one part in `SHARED_PART` of their context and the longest answer, even beside a
    question of max_query_length.

    Args:
        longest_row: the most tokens that the model takes, None if it says nothing.
    """
    whole = sizes.whole[sizes.windows > 0]
    length = _up(max(_quantile(whole, WHOLE_SHARE), special_tokens + max_query_length + 1), LENGTH_UNIT)
    length = length if longest_row is None else min(length, longest_row)
    room = length - special_tokens - max_query_length
    if room < 1:
        return {}
    stride = room - max(int(sizes.answer.max(initial=0)), room // SHARED_PART)
    stride = max(1, stride // STRIDE_UNIT * STRIDE_UNIT if stride >= STRIDE_UNIT else stride)
    example, _, tokens = cut_windows(sizes.context, length - sizes.beside, np.full_like(sizes.context, stride))
    return {
        "max_seq_length": length,
        "doc_stride": stride,
        "doc_stride_is": "step",
        "windows": len(example),
        "tokens": int(tokens.sum() + sizes.beside[example].sum()),
    }


def _up(number: float, unit: int) -> int:
    return int(-(-number // unit) * unit)


def padding_ratio(lengths: np.ndarray, batches: list[np.ndarray], multiple: int) -> float:
    """The ratio of padding when the rows of each batch are padded to its longest, and that to a multiple.

    Args: lengths int `[features]`; batches: row numbers of each.
    """
    padded = sum(len(rows) * _up(int(lengths[rows].max()), multiple) for rows in batches)
    return 1 - int(lengths.sum()) / padded if padded else 0.0
