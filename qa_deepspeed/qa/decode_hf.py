"""Decoding by the rules of Transformers' question-answering example, answer for answer.

Rules: `postprocess_qa_predictions` in examples/pytorch/question-answering/utils_qa.py of
https://github.com/huggingface/transformers. Per window the n_best_size best starts and ends of the whole row, padding
and question included, are paired; so a good span may be missed where `exact` decoding finds it. Texts are not trimmed;
the null answer is position 0; it competes for a place among the n_best_size; a question without any span is answered
with the word "empty". Null odds are taken in float32, end logit after start logit, as there.

Differs in two places where the original ends in an error: a question of v2 data without a feature, and one whose spans
are all blank, are answered with "".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from qa_deepspeed.qa.examples import Example
from qa_deepspeed.qa.full_logits import FeatureRowSource, FullLogits, question_chunks
from qa_deepspeed.qa.predictions import NO_SPAN_NULL_ODDS, DecodeSettings, NBestEntry, Prediction, columns_of


class _Pairs(NamedTuple):
    """Valid spans of one question, best first, equal scores in the order found; arrays are [k]."""

    score: np.ndarray  # float32
    start_logit: np.ndarray
    end_logit: np.ndarray
    begin: np.ndarray  # characters
    end: np.ndarray


def decode_like_transformers(
    logits: FullLogits, store: FeatureRowSource, settings: DecodeSettings
) -> Iterator[Prediction]:
    """Yield a `Prediction` for every example of the store, in the store's order."""
    for rows, examples, bounds in question_chunks(logits, store):
        start_logits, end_logits = np.asarray(logits.start_logits[rows]), np.asarray(logits.end_logits[rows])
        row, pairs = _best_pairs(np.asarray(logits.feature_id[rows]), start_logits, end_logits, store, settings)
        null_score = start_logits[:, 0] + end_logits[:, 0]
        of_row = np.searchsorted(row, bounds)
        for question, index in enumerate(examples):
            part = slice(of_row[question], of_row[question + 1])
            found = _Pairs(*(column[part] for column in pairs))
            found = _Pairs(*(column[np.argsort(-found.score, kind="stable")] for column in found))
            windows = range(bounds[question], bounds[question + 1])
            null = None
            if windows:
                lowest = windows[int(np.argmin(null_score[windows.start : windows.stop]))]
                null = null_score[lowest], start_logits[lowest, 0], end_logits[lowest, 0]
            yield _prediction(store.examples[index], found, null, settings)


def _best_pairs(
    feature_id: np.ndarray,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    store: FeatureRowSource,
    settings: DecodeSettings,
) -> tuple[np.ndarray, _Pairs]:
    """Row of each valid pair, and the pairs: rows in order, starts best first, for each the ends best first."""
    # the sort must be the original's own (unstable) one, since equal logits are common in half precision
    starts, ends = (np.argsort(x)[:, -1 : -settings.n_best_size - 1 : -1] for x in (start_logits, end_logits))
    window = store.take(feature_id)
    begin, stop = window.context_begin[:, None], window.context_end[:, None]
    inside_start = (starts >= begin) & (starts < stop)
    inside_end = (ends >= begin) & (ends < stop)
    length = ends[:, None, :] - starts[:, :, None] + 1
    valid = inside_start[:, :, None] & inside_end[:, None, :] & (length >= 1) & (length <= settings.max_answer_length)
    row, s, e = np.nonzero(valid)
    start, end = starts[row, s], ends[row, e]
    start_logit, end_logit = start_logits[row, start], end_logits[row, end]
    characters = store.character_spans(feature_id[row], start, end)
    return row, _Pairs(start_logit + end_logit, start_logit, end_logit, *characters)


def _prediction(
    example: Example, found: _Pairs, null: tuple[np.float32, np.float32, np.float32] | None, settings: DecodeSettings
) -> Prediction:
    size, v2 = settings.n_best_size, settings.version_2_with_negative
    kept: list[tuple[str, float, float, float, int, int]] = [
        (example.context[begin:end], float(score), float(start_logit), float(end_logit), int(begin), int(end))
        for score, start_logit, end_logit, begin, end in zip(*(column[:size] for column in found), strict=True)
    ]
    if v2 and null is not None:
        null_entry = ("", float(null[0]), float(null[1]), float(null[2]), 0, 0)
        kept.insert(int((found.score >= null[0]).sum()), null_entry)
        kept = kept[:size]
        if not any(begin == end == 0 for *_, begin, end in kept):
            kept.append(null_entry)
    if not kept or (len(kept) == 1 and kept[0][0] == ""):
        kept.insert(0, ("empty", 0.0, 0.0, 0.0, -1, -1))
    nbest = _nbest(kept)
    if not v2:
        return Prediction(example.example_id, nbest[0][0], columns_of(nbest), None)
    best = next((entry for entry in nbest if entry[0]), None)
    if null is None or best is None:
        return Prediction(example.example_id, "", columns_of(nbest), NO_SPAN_NULL_ODDS)
    text, _, start_logit, end_logit, _ = best
    odds = float(null[0] - np.float32(start_logit) - np.float32(end_logit))
    answer = "" if odds > settings.null_score_diff_threshold else text
    return Prediction(example.example_id, answer, columns_of(nbest), odds)


def _nbest(kept: list[tuple[str, float, float, float, int, int]]) -> list[NBestEntry]:
    scores = np.array([score for _, score, *_ in kept])
    exponential = np.exp(scores - scores.max())
    shares = (exponential / exponential.sum()).astype(np.float32).tolist()
    return [
        (text, share, start_logit, end_logit, begin if text else -1)
        for (text, _, start_logit, end_logit, begin, _), share in zip(kept, shares, strict=True)
    ]
