"""Decode candidates: the best spans of every feature become one n-best list and one answer per question (numpy only).

The device selects, per feature, its best valid spans and the null score. This module joins the windows of a question:
it sorts the candidates by score, drops a span with the same characters as a better one, trims blanks around a
slice, takes the `n_best_size` best, and runs one softmax over them and, for v2.0 data, the null entry. Questions are
decoded in chunks of bounded size and yielded one by one, so memory does not grow with their number.

Deliberate differences from other decoders: an answer is never the literal "empty"; no span is missed because its start
or end is not among the best of its window; ties are broken by character start, then end, then feature id. A list is
shorter than n_best_size only where the windows have fewer candidates that are neither blank nor repeated.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from typing import Any, NamedTuple, Protocol

import numpy as np

from qa_deepspeed.qa.decoding.predictions import (
    NO_SPAN_NULL_ODDS,
    DecodeSettings,
    Prediction,
    columns_of,
    write_predictions,
)
from qa_deepspeed.utils.errors import UserError

__all__ = ["NO_SPAN_NULL_ODDS", "Candidates", "DecodeSettings", "Prediction", "decode", "write_predictions"]

ROWS_PER_CHUNK = 384  # so that the lists of a chunk fit the processor's cache
NO_WINDOW = (math.inf, 0.0)


@dataclass
class Candidates:
    """The best valid spans of each feature. Arrays may be memory-mapped: they are read in order, a slice at a time."""

    feature_id: np.ndarray  # int64 [features], sorted, unique
    start: np.ndarray  # int32 [features, n] token positions in the unpadded row; -1: no candidate here
    end: np.ndarray  # int32 [features, n]
    start_logit: np.ndarray  # float32 [features, n], sorted by start_logit + end_logit, best first
    end_logit: np.ndarray  # float32 [features, n]
    null_start_logit: np.ndarray  # float32 [features], start_logit[null]
    null_end_logit: np.ndarray  # float32 [features], end_logit[null]

    def null_scores(self, rows: slice = slice(None)) -> np.ndarray:
        """The sum of both logits of the null position, float32 `[rows]`."""
        score: np.ndarray = np.asarray(self.null_start_logit[rows]) + np.asarray(self.null_end_logit[rows])
        return score


class FeatureSource(Protocol):
    """The part of a feature store that decoding uses."""

    example_index: np.ndarray  # int64 [features], non-decreasing
    # len() and iter() over Examples; ids_and_contexts(begin, end) -> (ids, contexts), lists for a range of examples,
    # is preferred where it exists, since building whole Examples takes longer than decoding them
    examples: Any

    def character_spans(
        self, rows: np.ndarray, start_positions: np.ndarray, end_positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass
class _Spans:
    """Spans of a chunk, grouped by question and sorted best first within each question. All arrays are [spans]."""

    question: np.ndarray  # index within the chunk
    begin: np.ndarray  # characters, end excluded
    end: np.ndarray
    start_logit: np.ndarray
    end_logit: np.ndarray
    score: np.ndarray  # float32, as the device summed it

    def take(self, index: np.ndarray) -> _Spans:
        return _Spans(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def without(self, index: np.ndarray | list[int]) -> _Spans:
        return self.take(np.delete(np.arange(len(self.question)), index)) if len(index) else self


class _Nulls(NamedTuple):
    """The null answer of each question of a chunk: its logits and their sum, float32 [questions].

    A question without a window has the logits `NO_WINDOW`.
    """

    start_logit: np.ndarray
    end_logit: np.ndarray
    score: np.ndarray


def decode(
    candidates: Candidates, store: FeatureSource, settings: DecodeSettings, rows_per_chunk: int = ROWS_PER_CHUNK
) -> Iterator[Prediction]:
    """Yield a `Prediction` for every example of the store, in the store's order.

    Examples without a feature or without a valid span are answered with "" and, for v2 data, null odds of
    `NO_SPAN_NULL_ODDS`.

    Raises:
        UserError: a logit is not a finite number.
    """
    example_count = len(store.examples)
    rows = len(candidates.feature_id)
    texts = _Texts(store.examples)
    next_example = row = 0
    while row < rows:
        stop, example_of_row = _cut_chunk(candidates, store, row, rows_per_chunk)
        examples = range(next_example, int(example_of_row[-1]) + 1)
        yield from _decode_chunk(candidates, slice(row, stop), example_of_row, examples, texts, store, settings)
        next_example, row = examples.stop, stop
    for example_id in texts.take(range(next_example, example_count))[0]:
        yield _without_span(example_id, NO_WINDOW, settings)


def _cut_chunk(candidates: Candidates, store: FeatureSource, row: int, size: int) -> tuple[int, np.ndarray]:
    """The end of the chunk that starts at `row` and the example of each of its rows; no example is cut in two."""
    rows = len(candidates.feature_id)
    while True:
        stop = min(row + size, rows)
        examples = np.asarray(store.example_index[np.asarray(candidates.feature_id[row:stop])])
        assert (np.diff(examples) >= 0).all(), "features of one example must be adjacent and in example order"
        if stop == rows:
            return stop, examples
        following = int(store.example_index[int(candidates.feature_id[stop])])
        complete = int(np.searchsorted(examples, following, side="left"))
        if complete:
            return row + complete, examples[:complete]
        size *= 2  # one example fills the whole chunk


def _decode_chunk(
    candidates: Candidates,
    rows: slice,
    example_of_row: np.ndarray,
    examples: range,
    texts: _Texts,
    store: FeatureSource,
    settings: DecodeSettings,
) -> Iterator[Prediction]:
    question_of_row = example_of_row - examples.start
    example_ids, contexts = texts.take(examples)
    _check_finite(candidates, rows, question_of_row, example_ids)
    spans = _gather_spans(candidates, rows, question_of_row, store, settings)
    spans = _sorted_by_score(spans)
    spans = spans.without(_repeats(spans))
    best, answers = _best_spans(spans, contexts, settings)
    nulls = _lowest_nulls(candidates, rows, question_of_row, len(examples))
    return _predictions(best, answers, nulls, example_ids, settings)


class _Texts:
    """Ids and contexts of the examples, read in order, a range at a time."""

    def __init__(self, examples: Any):
        self._by_range = getattr(examples, "ids_and_contexts", None)
        self._one_by_one = iter(()) if self._by_range else iter(examples)

    def take(self, wanted: range) -> tuple[list[str], list[str]]:
        """The ids and the contexts of the next examples, whose numbers are `wanted`."""
        if self._by_range:
            ids, contexts = self._by_range(wanted.start, wanted.stop)
            return ids, contexts
        chunk = list(islice(self._one_by_one, len(wanted)))
        return [example.example_id for example in chunk], [example.context for example in chunk]


def _check_finite(candidates: Candidates, rows: slice, question_of_row: np.ndarray, example_ids: list[str]) -> None:
    score = np.asarray(candidates.start_logit[rows]) + np.asarray(candidates.end_logit[rows])
    bad = ~np.isfinite(score) & (np.asarray(candidates.start[rows]) >= 0)
    bad_rows = np.flatnonzero(bad.any(axis=1) | ~np.isfinite(candidates.null_scores(rows)))
    if len(bad_rows):
        example_id = example_ids[question_of_row[bad_rows[0]]]
        raise UserError(
            f"the model's logits for question {example_id} are not finite numbers: its weights have diverged "
            "(lower the learning rate, or train with bf16 or fp32 instead of fp16) or are damaged"
        )


def _lowest_nulls(candidates: Candidates, rows: slice, question_of_row: np.ndarray, questions: int) -> _Nulls:
    """The null logits of each question's first window with the lowest null score."""
    score = candidates.null_scores(rows)
    lowest = np.full(questions, np.inf, np.float32)
    np.minimum.at(lowest, question_of_row, score)
    row = np.flatnonzero(score == lowest[question_of_row])[::-1]  # of equal windows the first is written last
    start_logit, end_logit = lowest.copy(), np.zeros(questions, np.float32)
    start_logit[question_of_row[row]] = np.asarray(candidates.null_start_logit[rows])[row]
    end_logit[question_of_row[row]] = np.asarray(candidates.null_end_logit[rows])[row]
    return _Nulls(start_logit, end_logit, lowest)


def _gather_spans(
    candidates: Candidates, rows: slice, question_of_row: np.ndarray, store: FeatureSource, settings: DecodeSettings
) -> _Spans:
    """The chunk's candidates as flat arrays, in the order of the rows."""
    width = candidates.start.shape[1]
    start = np.asarray(candidates.start[rows]).ravel()
    found = np.flatnonzero(start >= 0)
    row = found // width
    start, end, start_logit, end_logit = (
        np.asarray(column[rows]).ravel()[found]
        for column in (candidates.start, candidates.end, candidates.start_logit, candidates.end_logit)
    )
    assert (start <= end).all() and (end - start < settings.max_answer_length).all(), "the device gave invalid spans"
    begin, stop = store.character_spans(np.asarray(candidates.feature_id[rows])[row], start, end)
    question, begin, stop = question_of_row[row], begin.astype(np.int64), stop.astype(np.int64)
    return _Spans(question, begin, stop, start_logit, end_logit, start_logit + end_logit)


def _sorted_by_score(spans: _Spans) -> _Spans:
    """Sort by question, score (descending), begin, end. Questions of one window arrive sorted and are left as is."""
    same = spans.question[1:] == spans.question[:-1]
    wrong = same & (spans.score[:-1] < spans.score[1:])
    tie = np.flatnonzero(same & (spans.score[:-1] == spans.score[1:]))
    if len(tie):
        later = (spans.begin[tie] > spans.begin[tie + 1]) | (
            (spans.begin[tie] == spans.begin[tie + 1]) & (spans.end[tie] > spans.end[tie + 1])
        )
        wrong[tie] = later
    disordered = np.unique(spans.question[1:][wrong])
    if not len(disordered):
        return spans
    index = np.flatnonzero(np.isin(spans.question, disordered))
    part = spans.take(index)
    # lexsort is stable: remaining ties stay in the order of feature ids
    order = np.arange(len(spans.question))
    order[index] = index[np.lexsort((part.end, part.begin, -part.score, part.question))]
    return spans.take(order)


def _repeats(spans: _Spans) -> np.ndarray:
    """Indices of spans with the same characters as an earlier, better span of the same question."""
    if not len(spans.question):
        return np.zeros(0, np.int64)
    length = int(spans.end.max()) + 1
    assert (int(spans.question[-1]) + 1) * length * length < 2**63, "a context is too long for the span keys"
    key = (spans.question * length + spans.begin) * length + spans.end
    # a plain sort is many times faster than an argsort, which only the few repeated keys need
    ordered = np.sort(key)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(twice):
        return np.zeros(0, np.int64)
    repeated = np.flatnonzero(twice[np.minimum(np.searchsorted(twice, key), len(twice) - 1)] == key)
    order = repeated[np.argsort(key[repeated], kind="stable")]
    later: np.ndarray = order[1:][key[order][1:] == key[order][:-1]]
    return later


def _best_spans(spans: _Spans, contexts: list[str], settings: DecodeSettings) -> tuple[_Spans, list[str]]:
    """The n_best_size best spans of each question, blanks trimmed, and their texts."""
    best, texts, faulty = _trimmed_head(spans, contexts, settings)
    if faulty:
        dropped = [i for question in faulty for i in _blank_or_repeated(spans, question, contexts[question], settings)]
        best, texts, _ = _trimmed_head(spans.without(dropped), contexts, settings)
    return best, texts


def _trimmed_head(spans: _Spans, contexts: list[str], settings: DecodeSettings) -> tuple[_Spans, list[str], list[int]]:
    """The first n_best_size spans of each question without leading and trailing blanks, their texts, and the questions
    that have blank spans or spans that are equal after trimming.
    """
    first = np.searchsorted(spans.question, np.arange(len(contexts)))
    rank = np.arange(len(spans.question)) - first[spans.question]
    best = spans.without(np.flatnonzero(rank >= settings.n_best_size))
    lengths = np.fromiter(map(len, contexts), np.int64, len(contexts))
    assert (best.begin <= best.end).all() and (best.end <= lengths[best.question]).all(), "span outside its context"
    counts = np.bincount(best.question, minlength=len(contexts)).tolist()
    context_of_span = chain.from_iterable(map(repeat, contexts, counts))
    raw = [c[begin:end] for c, begin, end in zip(context_of_span, best.begin.tolist(), best.end.tolist(), strict=True)]
    texts = list(map(str.strip, raw))
    faulty: set[int] = set()
    if texts != raw:
        leading = np.fromiter((len(text) - len(text.lstrip()) for text in raw), np.int64, len(raw))
        begin = best.begin + leading
        best = replace(best, begin=begin, end=begin + np.fromiter(map(len, texts), np.int64, len(texts)))
        faulty.update(best.question[_repeats(best)].tolist())
    faulty.update(best.question[best.begin == best.end].tolist())
    if settings.merge_duplicate_texts:
        pairs = Counter(zip(best.question.tolist(), texts, strict=True))
        faulty.update(question for (question, _), times in pairs.items() if times > 1)
    return best, texts, sorted(faulty)


def _blank_or_repeated(spans: _Spans, question: int, context: str, settings: DecodeSettings) -> list[int]:
    """Indices of one question's spans that are blank or repeat a better one."""
    first, last = np.searchsorted(spans.question, [question, question + 1])
    dropped, seen = [], set()
    for i in range(first, last):
        begin, end = int(spans.begin[i]), int(spans.end[i])
        text = context[begin:end].strip()
        begin += len(context[begin:end]) - len(context[begin:end].lstrip())
        identity = text if settings.merge_duplicate_texts else (begin, begin + len(text))
        if not text or identity in seen:
            dropped.append(i)
        seen.add(identity)
    return dropped


def _predictions(
    best: _Spans, texts: list[str], nulls: _Nulls, example_ids: list[str], settings: DecodeSettings
) -> Iterator[Prediction]:
    size = settings.n_best_size
    first = np.searchsorted(best.question, np.arange(len(example_ids) + 1))
    # [questions, n_best_size + 1]; the last column holds the null entry. A fixed width gives every sum the same number
    # of terms, so the last digits do not depend on the other questions of a chunk.
    score = np.full((len(example_ids), size + 1), -np.inf)
    rank = np.arange(len(best.question)) - first[best.question]
    score[best.question, rank] = best.score
    answered = first[1:] > first[:-1]
    null_score = nulls.score.astype(np.float64)
    null_odds = null_score - score[:, 0]
    if settings.null_score_is_odds:
        # The null entry's probability is then the logistic function of the odds. Questions without a span have no such
        # probability: their null score is -inf, or NaN without any window.
        with np.errstate(invalid="ignore"):
            null_odds, null_score = null_score, null_score + np.logaddexp.reduce(score, axis=1)
    if settings.version_2_with_negative:
        score[:, size] = np.where(np.isfinite(null_score), null_score, -np.inf)
    probability = _probabilities(score, answered)
    columns = [probability[best.question, rank], best.start_logit, best.end_logit, best.begin]
    null_rank = (score[:, :size] >= null_score[:, None]).sum(axis=1)
    ends, v2, threshold = first[1:], settings.version_2_with_negative, settings.null_score_diff_threshold
    if v2:
        place = (first[:-1] + null_rank)[answered]
        entry = _null_entry(probability[answered, size], nulls.start_logit[answered], nulls.end_logit[answered])
        columns = [np.insert(column, place, null) for column, null in zip(columns, entry[1:], strict=True)]
        ends = ends + np.cumsum(answered)
    columns_of_question = zip(
        example_ids,
        first[:-1].tolist(),
        first[1:].tolist(),
        ends.tolist(),
        nulls.start_logit.tolist(),
        nulls.end_logit.tolist(),
        null_odds.tolist(),
        null_rank.tolist(),
        strict=True,
    )
    at = 0
    for example_id, begin, end, column_end, null_start, null_end, odds, rank_of_null in columns_of_question:
        if begin == end:
            yield _without_span(example_id, (null_start, null_end), settings)
            continue
        text, nbest_texts = texts[begin], texts[begin:end]
        nbest = (nbest_texts, *(column[at:column_end] for column in columns))
        at = column_end
        if v2:
            nbest_texts.insert(rank_of_null, "")
            yield Prediction(example_id, "" if odds > threshold else text, nbest, odds)
        else:
            yield Prediction(example_id, text, nbest, None)


def _probabilities(score: np.ndarray, answered: np.ndarray) -> np.ndarray:
    """Softmax over the n-best list of each answered question, 0 for the others; like the logits in float32, for exact
    round-trips through files. [questions, n_best_size + 1].
    """
    probability = np.zeros(score.shape, np.float32)
    exponential = np.exp(score[answered] - score[answered].max(axis=1, keepdims=True))
    probability[answered] = exponential / exponential.sum(axis=1, keepdims=True)
    return probability


def _null_entry(probability: Any, start_logit: Any, end_logit: Any) -> tuple[str, Any, Any, Any, int]:
    """The `NBEST_FIELDS` of the null entry; arrays give those of several questions at once."""
    return "", probability, start_logit, end_logit, -1


def _without_span(example_id: str, null_logits: tuple[float, float], settings: DecodeSettings) -> Prediction:
    known = settings.version_2_with_negative and null_logits != NO_WINDOW
    start_logit, end_logit = null_logits if known else (0.0, 0.0)
    odds = NO_SPAN_NULL_ODDS if settings.version_2_with_negative else None
    return Prediction(example_id, "", columns_of([_null_entry(1.0, start_logit, end_logit)]), odds)
