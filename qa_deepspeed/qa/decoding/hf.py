"""Decoding by the rules of Transformers' question-answering example, answer for answer.

Rules: `postprocess_qa_predictions` in examples/pytorch/question-answering/utils_qa.py of
https://github.com/huggingface/transformers. Per window the n_best_size best starts and ends of the whole row, padding
and question included, are paired; so a good span may be missed where `exact` decoding finds it. Texts are not trimmed;
the null answer is position 0; it competes for a place among the n_best_size; a question without any span is answered
with the word "empty". Null odds are computed in float32 in the same order as there: minus start logit, minus end logit.

Differs where the original raises an error: a question of v2 data without a feature, and one whose spans are all blank,
are answered with "".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.decoding.full_logits import FeatureRowSource, FullLogits, question_chunks
from qa_deepspeed.qa.decoding.predictions import NO_SPAN_NULL_ODDS, DecodeSettings, NBestEntry, Prediction, columns_of


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
    entries: list[tuple[str, float, float, float, int, int]] = [
        (example.context[begin:end], float(score), float(start_logit), float(end_logit), int(begin), int(end))
        for score, start_logit, end_logit, begin, end in zip(*(column[:size] for column in found), strict=True)
    ]
    if v2 and null is not None:
        null_entry = ("", float(null[0]), float(null[1]), float(null[2]), 0, 0)
        entries.insert(int((found.score >= null[0]).sum()), null_entry)
        entries = entries[:size]
        if not any(begin == end == 0 for *_, begin, end in entries):
            entries.append(null_entry)
    if not entries or (len(entries) == 1 and entries[0][0] == ""):
        entries.insert(0, ("empty", 0.0, 0.0, 0.0, -1, -1))
    nbest = _nbest(entries)
    if not v2:
        return Prediction(example.example_id, nbest[0][0], columns_of(nbest), None)
    best = next((entry for entry in nbest if entry[0]), None)
    if null is None or best is None:
        return Prediction(example.example_id, "", columns_of(nbest), NO_SPAN_NULL_ODDS)
    text, _, start_logit, end_logit, _ = best
    odds = float(null[0] - np.float32(start_logit) - np.float32(end_logit))
    answer = "" if odds > settings.null_score_diff_threshold else text
    return Prediction(example.example_id, answer, columns_of(nbest), odds)


def _nbest(entries: list[tuple[str, float, float, float, int, int]]) -> list[NBestEntry]:
    scores = np.array([score for _, score, *_ in entries])
    exponential = np.exp(scores - scores.max())
    probabilities = (exponential / exponential.sum()).astype(np.float32).tolist()
    return [
        (text, probability, start_logit, end_logit, begin if text else -1)
        for (text, _, start_logit, end_logit, begin, _), probability in zip(entries, probabilities, strict=True)
    ]


SAME = "same answer"
WORD_EMPTY = "hf finds no span and answers 'empty'"
BLANKS_TRIMMED = "exact trims blanks around a slice"
BLANK_SPAN = "hf's best span is blank, which is no answer for exact"
MISSED_SPAN = "hf pairs only the n_best_size best starts and ends of a window and misses a better span"
TIE = "spans of equal score: exact takes the first in the text, hf the first of its sort"
OTHER_NULL = "hf takes position 0 for the null answer, the model another position"
ODDS_ROUNDED = "null odds close to the threshold: hf rounds them to float32"


def difference_rule(exact: Prediction, hf: Prediction, settings: DecodeSettings) -> str:
    """The rule by which the two differ, or `SAME`.

    Raises:
        AssertionError: no rule explains the difference: one of the decoders is wrong.
    """
    if exact.text == hf.text:
        return SAME
    best_hf = next((entry for entry in hf.nbest if entry[0]), None)
    if best_hf is None or (best_hf[0] == "empty" and best_hf[-1] < 0):
        return WORD_EMPTY
    if exact.text == hf.text.strip() and exact.text:
        return BLANKS_TRIMMED
    if not best_hf[0].strip():
        return BLANK_SPAN
    best_exact = next((entry for entry in exact.nbest if entry[0]), None)
    assert best_exact is not None, f"{exact.example_id}: hf found a span where exact found none"
    score_exact, score_hf = _score(best_exact), _score(best_hf)
    assert score_exact >= score_hf, f"{exact.example_id}: hf found a better span than exact"
    if score_exact > score_hf:
        return MISSED_SPAN
    if best_exact[0] != best_hf[0].strip():
        return TIE
    assert exact.null_odds is not None and hf.null_odds is not None, (
        f"{exact.example_id}: best spans equal, answers not"
    )
    if _null_score(exact) != _null_score(hf):
        return OTHER_NULL
    rounding = 2 * float(np.spacing(np.float32(max(map(abs, (exact.null_odds, _null_score(hf), score_hf))))))
    near = abs(exact.null_odds - settings.null_score_diff_threshold) <= rounding
    assert near, f"{exact.example_id}: equal spans and null scores on different sides of the threshold"
    return ODDS_ROUNDED


def list_differences(
    exact: Iterable[Prediction], hf: Iterable[Prediction], settings: DecodeSettings
) -> list[dict[str, Any]]:
    """Every question that the two answer differently: example_id, exact, hf (texts) and rule.

    Both give the same questions in the same order.
    """
    differences = []
    for one, other in zip(exact, hf, strict=True):
        assert one.example_id == other.example_id, "predictions are in different orders"
        rule = difference_rule(one, other, settings)
        if rule != SAME:
            differences.append({"example_id": one.example_id, "exact": one.text, "hf": other.text, "rule": rule})
    return differences


def _score(entry: NBestEntry) -> float:
    _, _, start_logit, end_logit, _ = entry
    return float(np.float32(start_logit) + np.float32(end_logit))


def _null_score(prediction: Prediction) -> float:
    return next((_score(entry) for entry in prediction.nbest if not entry[0]), float("nan"))
