"""Decoding by the rules of the classic run_squad.py, answer for answer.

Rules: `compute_predictions_logits` in Transformers 4 (data/metrics/squad_metrics.py), after run_squad.py of
https://github.com/google-research/bert. Per window the n_best_size best starts and ends of the whole row are paired;
a start counts only in the window that gives its token most context; texts are rebuilt from the word pieces
(`final_text`) and each text counts once; the null answer is position 0; a question without any span is answered with
the word "empty". Scores are summed in float64.

Differs where the original raises an error: a question of v2 data without a feature, or with blank spans only, is
answered with "".
"""

from __future__ import annotations

import re
import string
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.decoding.full_logits import FeatureRowSource, FullLogits, question_chunks
from qa_deepspeed.qa.decoding.max_context import best_window_ranges
from qa_deepspeed.qa.decoding.predictions import NO_SPAN_NULL_ODDS, DecodeSettings, NBestEntry, Prediction, columns_of

_BLANKS = " \t\r\n"
_HAN = re.compile(
    "([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f])"
)


def basic_tokens(text: str, do_lower_case: bool) -> list[str]:
    """Words, punctuation marks and Han characters as separate tokens; lower-casing also strips accents."""
    cleaned = "".join(_cleaned(character) for character in text)
    words = unicodedata.normalize("NFC", _HAN.sub(r" \1 ", cleaned)).split()
    if do_lower_case:
        words = [_without_accents(word.lower()) for word in words]
    return "".join(f" {c} " if _is_punctuation(c) else c for c in " ".join(words)).split()


def _cleaned(character: str) -> str:
    if character in _BLANKS or unicodedata.category(character) == "Zs":
        return " "
    return "" if character == "\ufffd" or unicodedata.category(character)[0] == "C" else character


def _without_accents(word: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", word) if unicodedata.category(c) != "Mn")


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character)[0] == "P"


@lru_cache(maxsize=4096)
def final_text(predicted: str, original: str, do_lower_case: bool) -> str:
    """The part of `original` (whole words) that corresponds to the tokenized `predicted`.

    Both are aligned by their characters other than spaces; if that fails, all of `original` is the answer.
    """
    tokenized = " ".join(basic_tokens(original, do_lower_case))
    begin = tokenized.find(predicted)
    if begin < 0:
        return original
    end = begin + len(predicted) - 1
    places = [place for place, character in enumerate(original) if character != " "]
    order = {place: i for i, place in enumerate(p for p, c in enumerate(tokenized) if c != " ")}
    if len(places) != len(order) or begin not in order or end not in order:
        return original
    return original[places[order[begin]] : places[order[end]] + 1]


_WORD = re.compile(r"[^ \t\r\n\u202f]+")  # run_squad.py splits contexts at these blanks only


@dataclass(frozen=True)
class ClassicText:
    """How the tokens of a span become its text.

    tokens_to_text: from token ids to the text as the tokenizer joins them (`wordpiece_joiner`).
    """

    tokens_to_text: Callable[[np.ndarray], str]
    do_lower_case: bool


def wordpiece_joiner(vocabulary: Sequence[str]) -> Callable[[np.ndarray], str]:
    """`tokens_to_text` of BERT's slow tokenizer. `vocabulary` holds the token of each id."""
    return lambda ids: " ".join(vocabulary[i] for i in ids).replace(" ##", "").strip()


def classic_text(tokenizer: Any) -> ClassicText:
    """`ClassicText` of a Transformers tokenizer: how it joins tokens, and whether it lower-cases."""
    vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    lower = bool(getattr(tokenizer, "do_lower_case", False))
    if any(piece.startswith("##") for piece in vocabulary):
        return ClassicText(wordpiece_joiner(vocabulary), lower)
    return ClassicText(lambda ids: tokenizer.convert_tokens_to_string([vocabulary[i] for i in ids]), lower)


class _Span(NamedTuple):
    start_logit: float
    end_logit: float
    begin: int  # the character where the first token begins
    last: int  # the character where the last token begins
    ids: np.ndarray  # of its tokens


class _Entry(NamedTuple):
    text: str
    start_logit: float
    end_logit: float
    begin: int


def decode_classic(
    logits: FullLogits, store: FeatureRowSource, settings: DecodeSettings, how: ClassicText
) -> Iterator[Prediction]:
    """Yield a `Prediction` for every example of the store, in the store's order."""
    for rows, examples, bounds in question_chunks(logits, store):
        feature_id = np.asarray(logits.feature_id[rows])
        start_logits, end_logits = np.asarray(logits.start_logits[rows]), np.asarray(logits.end_logits[rows])
        window = store.take(feature_id)
        first, stop = best_window_ranges(np.asarray(store.example_index)[feature_id], *store.windows(feature_id))
        starts = (window.context_begin + first, window.context_begin + stop)
        row, start, end = _valid_pairs(start_logits, end_logits, window, starts, settings)
        score = start_logits[row, start].astype(float) + end_logits[row, end]
        begin = store.character_spans(feature_id[row], start, start)[0]
        last = store.character_spans(feature_id[row], end, end)[0]
        of_row = np.searchsorted(row, bounds)
        for question, index in enumerate(examples):
            first, stop = of_row[question], of_row[question + 1]
            order = first + np.argsort(-score[first:stop], kind="stable")
            spans = (
                _Span(
                    float(start_logits[row[i], start[i]]),
                    float(end_logits[row[i], end[i]]),
                    int(begin[i]),
                    int(last[i]),
                    window.input_ids[window.row_splits[row[i]] + start[i] : window.row_splits[row[i]] + end[i] + 1],
                )
                for i in order
            )
            windows = range(bounds[question], bounds[question + 1])
            nulls = [(float(start_logits[w, 0]), float(end_logits[w, 0])) for w in windows]
            yield _prediction(store.examples[index], spans, nulls, settings, how)


def _valid_pairs(
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    window: Any,
    allowed: tuple[np.ndarray, np.ndarray],
    settings: DecodeSettings,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, start and end of each pair that may be an answer: rows in order, starts best first, ends best first.

    allowed: the starts [first, stop) of each row that count, int [rows] twice.
    """
    starts, ends = (
        np.argsort(-x, axis=1, kind="stable")[:, : settings.n_best_size] for x in (start_logits, end_logits)
    )
    begin, stop = window.context_begin[:, None], window.context_end[:, None]
    inside_start = (starts >= allowed[0][:, None]) & (starts < allowed[1][:, None])
    inside_end = (ends >= begin) & (ends < stop)
    length = ends[:, None, :] - starts[:, :, None] + 1
    valid = inside_start[:, :, None] & inside_end[:, None, :] & (length >= 1) & (length <= settings.max_answer_length)
    row, s, e = np.nonzero(valid)
    return row, starts[row, s], ends[row, e]


def _prediction(
    example: Example,
    spans: Iterator[_Span],
    nulls: list[tuple[float, float]],
    settings: DecodeSettings,
    how: ClassicText,
) -> Prediction:
    v2 = settings.version_2_with_negative
    null = min(nulls, key=sum, default=None) if v2 else None
    entries = _distinct(example.context, spans, null, settings.n_best_size, how)
    if null is not None:
        if not any(entry.text == "" for entry in entries):
            entries.append(_Entry("", *null, -1))
        if len(entries) == 1:
            entries.insert(0, _Entry("empty", 0.0, 0.0, -1))
    if not entries:
        entries.append(_Entry("empty", 0.0, 0.0, -1))
    nbest = columns_of(_nbest(entries))
    if not v2:
        return Prediction(example.example_id, entries[0].text, nbest, None)
    best = next((entry for entry in entries if entry.text), None)
    if null is None or best is None:
        return Prediction(example.example_id, "", nbest, NO_SPAN_NULL_ODDS)
    odds = sum(null) - best.start_logit - best.end_logit
    return Prediction(example.example_id, "" if odds > settings.null_score_diff_threshold else best.text, nbest, odds)


def _distinct(
    context: str, spans: Iterator[_Span], null: tuple[float, float] | None, size: int, how: ClassicText
) -> list[_Entry]:
    """The `size` best entries with different texts, with the null entry by rank if it is among them."""
    words = [(match.start(), match.end()) for match in _WORD.finditer(context)]
    word_begins = [begin for begin, _ in words]
    entries: list[_Entry] = []
    seen: set[str] = set()
    null_pending = null
    for span in spans:
        if null_pending is not None and sum(null_pending) > span.start_logit + span.end_logit:
            if len(entries) < size:
                entries.append(_Entry("", *null_pending, -1))
                seen.add("")
            null_pending = None
        if len(entries) >= size:
            return entries
        first, last = bisect_right(word_begins, span.begin) - 1, bisect_right(word_begins, span.last) - 1
        original = " ".join(context[begin:end] for begin, end in words[first : last + 1])
        text = final_text(" ".join(how.tokens_to_text(span.ids).split()), original, how.do_lower_case)
        if text not in seen:
            seen.add(text)
            begin = word_begins[first] if text == original else span.begin
            entries.append(_Entry(text, span.start_logit, span.end_logit, begin))
    if null_pending is not None and len(entries) < size:
        entries.append(_Entry("", *null_pending, -1))
    return entries


def _nbest(entries: list[_Entry]) -> list[NBestEntry]:
    scores = np.array([entry.start_logit + entry.end_logit for entry in entries])
    exponential = np.exp(scores - scores.max())
    probabilities = (exponential / exponential.sum()).astype(np.float32).tolist()
    return [(e.text, p, e.start_logit, e.end_logit, e.begin) for e, p in zip(entries, probabilities, strict=True)]
