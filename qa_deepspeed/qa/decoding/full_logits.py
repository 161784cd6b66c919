"""Whole rows of logits, for the decoders that rank all positions of a row, and the features that they need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

ROWS_AT_ONCE = 512


@dataclass
class FullLogits:
    """Logits of every position. Rows are right-padded: column p is token p of the unpadded row.

    Padding takes part in the ranking of a row, as in the original decoders; fill it with the model's own logits for
    padding, or with a very low number.
    """

    feature_id: np.ndarray  # int64 [features], sorted, unique
    start_logits: np.ndarray  # float32 [features, length]
    end_logits: np.ndarray  # float32 [features, length]


class FeatureRowSource(Protocol):
    """The part of a feature store that the decoders of full logits use."""

    example_index: np.ndarray  # int64 [features], non-decreasing
    examples: Any  # len() and [i] -> Example

    def take(self, rows: np.ndarray) -> Any: ...  # has row_splits, input_ids, context_begin, context_end

    def windows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

    def character_spans(
        self, rows: np.ndarray, start_positions: np.ndarray, end_positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]: ...


def question_chunks(logits: FullLogits, store: FeatureRowSource) -> Iterator[tuple[slice, range, np.ndarray]]:
    """Cut into chunks of about ROWS_AT_ONCE rows, each question whole; chunks cover all examples of the store in order.

    Yields:
        rows of `logits`; the examples of the chunk; bounds int [examples + 1], the rows of each example, counted from
        the first row of the chunk (an example without a feature has none).
    """
    example = np.asarray(store.example_index)[np.asarray(logits.feature_id)]
    assert (np.diff(example) >= 0).all(), "features of one example must be adjacent and in example order"
    row = first = 0
    while first < len(store.examples):
        # up to the end of the question that the last row of the chunk belongs to
        reached = min(row + ROWS_AT_ONCE, len(example)) - 1
        last = int(example[reached]) + 1 if reached + 1 < len(example) else len(store.examples)
        bounds = np.searchsorted(example, np.arange(first, last + 1))
        yield slice(row, int(bounds[-1])), range(first, last), bounds - row
        row, first = int(bounds[-1]), last
