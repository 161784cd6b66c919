"""Examples to features, one shard at a time, by array operations.

A feature is a window: a question of the shard, and a slice of the tokens of a context. Rows are assembled when they
are read (`store.py`), so that a context is tokenized and stored once however many questions and windows it has.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from qa_deepspeed.qa.features.arrow import ColumnTable
from qa_deepspeed.qa.features.encoding import Encoder, Tokens
from qa_deepspeed.qa.features.example_store import WITHOUT_GOLD, has_gold
from qa_deepspeed.qa.features.windows import covering_tokens, cut_windows, ranges, splits_of
from qa_deepspeed.utils.errors import UserError


@dataclass(frozen=True)
class FeatureSettings:
    """What shapes the features. Lengths are tokens.

    doc_stride counts from the start of one window to the start of the next (`step`, as the classic script), or the
    tokens that neighbours share (`overlap`, as a tokenizer's `stride`). answers: label the first gold answer, or keep
    all. windows_without_answer: what training without unanswerable questions does with windows that miss the answer:
    keep them, drop them, or keep one of them per question, drawn by the question's id.
    """

    max_seq_length: int = 384
    doc_stride: int = 128
    doc_stride_is: Literal["step", "overlap"] = "step"
    max_query_length: int = 64
    answers: Literal["first", "all"] = "first"
    windows_without_answer: Literal["keep", "drop", "sample"] = "keep"


def check_settings(settings: FeatureSettings, special_tokens: int) -> None:
    """Raises UserError where windows of the longest permitted question would lose tokens or hold none."""
    if settings.max_query_length < 1 or settings.doc_stride < (1 if settings.doc_stride_is == "step" else 0):
        raise UserError("max_query_length and doc_stride must be at least 1 (an overlap at least 0)")
    room = settings.max_seq_length - special_tokens - settings.max_query_length
    if room < 1:
        raise UserError(
            f"max_seq_length {settings.max_seq_length} leaves no room for the context beside {special_tokens} special "
            f"tokens and a question of max_query_length {settings.max_query_length}; "
            f"raise it to more than {special_tokens + settings.max_query_length} or lower max_query_length"
        )
    largest = room if settings.doc_stride_is == "step" else room - 1
    if settings.doc_stride > largest:
        raise UserError(
            f"doc_stride {settings.doc_stride} (as {settings.doc_stride_is}) would skip tokens of the context when a "
            f"question has {settings.max_query_length} tokens (max_seq_length {settings.max_seq_length}); "
            f"the largest value that fits is {largest}"
        )


def build_features(
    examples: ColumnTable, encoder: Encoder, special_tokens: int, settings: FeatureSettings, drop_windows: bool
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The feature arrays of one shard of examples (see `store.FeatureShard` for them) and its counts.

    drop_windows: whether settings.windows_without_answer applies.
    """
    contexts = encoder.encode(examples.strings("contexts").to_pylist(), offsets=True)
    questions, cut_questions = _cut(
        encoder.encode(examples.strings("questions").to_pylist(), offsets=False), settings.max_query_length
    )
    question, context = examples.array("example_question"), examples.array("example_context")
    first, last, splits = _gold_spans(examples, contexts, settings)
    rooms = settings.max_seq_length - special_tokens - questions.lengths[question]
    stride = settings.doc_stride
    steps = np.full_like(rooms, stride) if settings.doc_stride_is == "step" else rooms - stride
    example, begin, length = cut_windows(contexts.lengths[context], rooms, steps)
    holds = _holds_gold(example, begin, length, first, last, splits)
    known = has_gold(examples)
    asked = (np.diff(examples.array("answer_splits")) > 0) & known
    without = asked[example] & ~holds
    keep = np.ones(len(example), dtype=bool)
    if drop_windows and settings.windows_without_answer != "keep":
        keep = ~without
        if settings.windows_without_answer == "sample":
            keep[_drawn(examples.strings("example_ids"), example, without)] = True
    held = np.zeros(len(question), dtype=bool)
    held[example[holds]] = True
    counts = {
        "examples": len(question),
        "features": int(keep.sum()),
        "examples_without_tokens": int((contexts.lengths[context] == 0).sum()),
        "truncated_questions": int(cut_questions[question].sum()),
        "windows_without_answer": int((without & keep).sum()),
        "windows_dropped": int((~keep).sum()),
        "answers_in_no_window": int((asked & ~held).sum()),
    }
    if not known.all():
        counts[WITHOUT_GOLD] = int((~known).sum())
    words = {} if contexts.word is None else {"context_word": contexts.word}
    return {
        **words,
        "context_ids": contexts.ids,
        "context_begin": contexts.begin,
        "context_end": contexts.end,
        "context_splits": contexts.splits,
        "question_ids": questions.ids,
        "question_splits": questions.splits,
        "example_question": question,
        "example_context": context,
        "gold_first": first.astype(np.int32),
        "gold_last": last.astype(np.int32),
        "gold_splits": splits,
        "feature_example": example[keep].astype(np.int32),
        "window_begin": begin[keep].astype(np.int32),
        "window_length": length[keep].astype(np.int32),
    }, counts


def _cut(tokens: Tokens, longest: int) -> tuple[Tokens, np.ndarray]:
    """Questions cut to their first `longest` tokens, and which were cut (bool `[questions]`)."""
    cut = tokens.lengths > longest
    if not cut.any():
        return tokens, cut
    lengths = np.minimum(tokens.lengths, longest)
    ids = tokens.ids[ranges(tokens.splits[:-1], lengths)]
    return Tokens(ids, tokens.begin, tokens.end, splits_of(lengths)), cut


def _gold_spans(
    examples: ColumnTable, contexts: Tokens, settings: FeatureSettings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Context tokens (first, last; inside) of the gold answers to label, ragged over the examples by the splits.

    Only located answers that have a token count; repeated spans of one example count once.
    """
    starts = examples.array("answer_starts").astype(np.int64)
    ends = starts + examples.array("answer_lengths")
    owner = np.repeat(np.arange(len(examples.array("example_context"))), np.diff(examples.array("answer_splits")))
    located = starts >= 0
    if settings.answers == "first":
        chosen = np.flatnonzero(located)
        located = np.zeros_like(located)
        located[chosen[np.unique(owner[chosen], return_index=True)[1]]] = True
    owner, starts, ends = owner[located], starts[located], ends[located]
    text = examples.array("example_context")[owner]
    first, last = covering_tokens(contexts.begin, contexts.end, contexts.splits, text, starts, ends)
    spans = np.stack([owner, first, last], axis=1)[first <= last]
    if settings.answers == "all":
        spans = spans[np.sort(np.unique(spans, axis=0, return_index=True)[1])]
    counts = np.bincount(spans[:, 0], minlength=len(examples.array("example_context")))
    return spans[:, 1], spans[:, 2], splits_of(counts)


def _holds_gold(
    example: np.ndarray, begin: np.ndarray, length: np.ndarray, first: np.ndarray, last: np.ndarray, splits: np.ndarray
) -> np.ndarray:
    """Whether each window holds the whole of a gold span of its example; bool `[windows]`."""
    golds = np.diff(splits)[example]
    gold = ranges(splits[example], golds)
    window = np.repeat(np.arange(len(example)), golds)
    inside = (first[gold] >= begin[window]) & (last[gold] < (begin + length)[window])
    holds = np.zeros(len(example), dtype=bool)
    holds[window[inside]] = True
    return holds


def _drawn(example_ids: pa.LargeStringArray, example: np.ndarray, without: np.ndarray) -> np.ndarray:
    """One window of each example that has some without its answer, drawn by the example's id; int64 `[drawn]`."""
    windows = np.flatnonzero(without)
    owners, first, counts = np.unique(example[windows], return_index=True, return_counts=True)
    draws = [
        int.from_bytes(hashlib.blake2b(example_ids[int(owner)].as_py().encode(), digest_size=8).digest(), "little")
        for owner in owners
    ]
    offsets = np.array([draw % int(count) for draw, count in zip(draws, counts, strict=True)], dtype=np.int64)
    drawn: np.ndarray = windows[first + offsets]
    return drawn
