"""Exact match and F1 by the rules of the official SQuAD v1.1 and v2.0 scripts, to the last digit.

v1.1: every question of the gold file counts; one without a prediction earns 0; an answer without a word earns no F1.
v2.0: gold texts that normalise to nothing are dropped, and a question left without any wants ""; questions without a
prediction are left out of the totals (and counted under `missing`).

Source: evaluate-v1.1.py and evaluate-v2.0.py at https://rajpurkar.github.io/SQuAD-explorer/. Sums are made in the same
order and with the same operations as there.
"""

from __future__ import annotations

import functools
import operator
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import compress
from typing import Any, NamedTuple

import numpy as np

from qa_deepspeed.errors import UserError
from qa_deepspeed.qa.normalization import normalized_tokens
from qa_deepspeed.qa.predictions import Prediction
from qa_deepspeed.qa.thresholds import ThresholdData, best_threshold, cross_fitted, official_best, scores_at


class Gold(NamedTuple):
    """A question's accepted answers; none if the context does not answer it."""

    example_id: str
    texts: tuple[str, ...]


def f1_of_tokens(gold: list[str], predicted: list[str]) -> float:
    """Harmonic mean of precision and recall over words with their multiplicities; 0 if none is shared."""
    shared = sum((Counter(gold) & Counter(predicted)).values())
    if not shared:
        return 0.0
    precision = 1.0 * shared / len(predicted)
    recall = 1.0 * shared / len(gold)
    return (2 * precision * recall) / (precision + recall)


def score_answer(text: str, golds: tuple[str, ...], v2: bool, language: str = "en") -> tuple[int, float]:
    """Exact match (0 or 1) and F1 (0..1) of one answer against the best fitting of its gold texts."""
    predicted = normalized_tokens(text, language)
    accepted = [normalized_tokens(gold, language) for gold in golds]
    if v2:
        accepted = [tokens for tokens in accepted if tokens] or [[]]
    exact = int(any(tokens == predicted for tokens in accepted))
    if exact and (predicted or v2):
        return 1, 1.0
    return exact, max((f1_of_tokens(tokens, predicted) for tokens in accepted), default=0.0)


class Scorer:
    """Takes questions one at a time, keeping a few bytes of each, and sums up at the end."""

    def __init__(self, version_2_with_negative: bool, language: str = "en"):
        self._v2 = version_2_with_negative
        self._language = language
        self._exact: array[int] = array("b")
        self._f1: array[float] = array("d")
        self._best_exact: array[int] = array("b")  # best_*: of the best span, whatever the null odds say
        self._best_f1: array[float] = array("d")
        self._best_given: array[int] = array("b")
        self._has_answer: array[int] = array("b")
        self._given: array[int] = array("b")
        self._half: array[int] = array("b")
        self._odds: array[float] = array("d")
        self._missing = self._missing_unanswerable = 0

    def add_missing(self, gold: Gold) -> None:
        """Take note of a question without a prediction."""
        self._missing += 1
        self._missing_unanswerable += not gold.texts

    def add(self, gold: Gold, text: str, null_odds: float | None = None, best_span_text: str | None = None) -> None:
        """Score one answer. Either all questions come with null odds or none does.

        Args:
            text: the answer given, "" for none.
            best_span_text: what would have been answered if the null odds were low enough, where that is known.
        """
        exact, f1 = score_answer(text, gold.texts, self._v2, self._language)
        self._exact.append(exact)
        self._f1.append(f1)
        if not self._v2:
            return
        self._has_answer.append(bool(gold.texts))
        self._given.append(bool(text))
        if null_odds is None:
            return
        self._odds.append(null_odds)
        if best_span_text is not None and best_span_text != text:
            exact, f1 = score_answer(best_span_text, gold.texts, self._v2, self._language)
        self._best_exact.append(exact)
        self._best_f1.append(f1)
        self._best_given.append(bool(text if best_span_text is None else best_span_text))
        self._half.append(zlib.crc32(gold.example_id.encode("utf-8", "surrogatepass")) & 1)

    def observe(self, predictions: Iterable[Prediction], golds: Iterable[Gold]) -> Iterator[Prediction]:
        """Pass predictions through, scoring each against the gold at the same place."""
        for prediction, gold in zip(predictions, golds, strict=True):
            assert prediction.example_id == gold.example_id, "predictions and golds are in different orders"
            best = prediction.best_span_text if self._v2 else None
            self.add(gold, prediction.text, prediction.null_odds, best)
            yield prediction

    def result(self, threshold: float | None = None, odds_order: np.ndarray | None = None) -> dict[str, Any]:
        """The metrics by name: exact, f1 (percent), total; for v2 the same of answerable questions (HasAns_) and of
        unanswerable ones (NoAns_); with null odds the best scores over all thresholds.

        Args:
            threshold: answers whose null odds exceed it count as ""; None takes all answers as they are.
            odds_order: int [questions], the order of the null odds file, if that is not the order of adding.
        """
        if not self._v2:
            total = len(self._exact) + self._missing
            f1_sum = functools.reduce(operator.add, self._f1, 0.0)  # the v1.1 script adds up one by one
            return {"exact": _percent(sum(self._exact), total), "f1": _percent(f1_sum, total), "total": total}
        exact: array[int] = self._exact[:]
        f1: array[float] = self._f1[:]
        if threshold is not None:
            for i, odds in enumerate(self._odds):
                if odds > threshold:
                    exact[i] = f1[i] = not self._has_answer[i]
        metrics: dict[str, Any] = _summed(exact, f1, array("b", [1]) * len(exact), "")
        for prefix, part in (("HasAns_", self._has_answer), ("NoAns_", array("b", (not h for h in self._has_answer)))):
            if any(part):
                metrics.update(_summed(exact, f1, part, prefix))
        assert len(self._odds) in (0, len(self._exact)), "either all questions come with null odds or none does"
        if self._odds:
            metrics.update(self._threshold_metrics(odds_order))
        return metrics

    def _threshold_metrics(self, odds_order: np.ndarray | None) -> dict[str, float]:
        """best_*: the official search on the answers given. tuned_*: the best that one threshold reaches on the best
        spans, equal odds taken together. crossfit_*: each half of the questions with the other half's threshold.
        """
        metrics: dict[str, float] = {}
        has_answer, given, best_given, half = (
            np.frombuffer(flags, np.int8).view(bool)
            for flags in (self._has_answer, self._given, self._best_given, self._half)
        )
        odds = np.frombuffer(self._odds)
        unanswerable = int((~has_answer).sum()) + self._missing_unanswerable
        answers = (("exact", np.frombuffer(self._exact, np.int8)), ("f1", np.frombuffer(self._f1)))
        for name, scores in answers:
            data = ThresholdData(odds, has_answer, scores, given)
            best, threshold = official_best(data if odds_order is None else data.take(odds_order), unanswerable)
            metrics[f"best_{name}"] = _percent(best, len(odds))
            metrics[f"best_{name}_thresh"] = threshold
        best_spans = (("exact", np.frombuffer(self._best_exact, np.int8)), ("f1", np.frombuffer(self._best_f1)))
        for name, scores in best_spans:
            data = ThresholdData(odds, has_answer, scores, best_given)
            threshold = best_threshold(data)
            metrics[f"tuned_{name}"] = 100.0 * float(scores_at(data, threshold).mean())
            metrics[f"tuned_{name}_thresh"] = threshold
            metrics[f"crossfit_{name}"] = 100.0 * float(cross_fitted(data, half).mean())
        return metrics


def score(
    golds: Iterable[Gold],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float] | None = None,
    threshold: float | None = None,
    *,
    version_2_with_negative: bool | None = None,
    language: str = "en",
) -> dict[str, Any]:
    """Score answers by question id; see `Scorer.result` for the names, to which `missing` and `extra` (numbers of
    questions without a prediction, and of predictions without a question) are added.

    Args:
        golds: in the order of the file; v2 counts an id that occurs twice once, its last entry, as the script does.
        null_odds: in the order of their file, which settles ties in the official search for the best threshold.
        threshold: answers whose null odds exceed it count as ""; None takes the answers as they are.
        version_2_with_negative: by which rules; None for v2 if null odds are given or a question has no gold text.

    Raises:
        UserError: nothing to score, or null odds missing for a question that has a prediction.
    """
    golds = list(golds)
    if version_2_with_negative is None:
        version_2_with_negative = null_odds is not None or any(not gold.texts for gold in golds)
    if version_2_with_negative:
        golds = list({gold.example_id: gold for gold in golds}.values())
    scored = [gold for gold in golds if gold.example_id in predictions]
    if not golds:
        raise UserError("the gold file has no questions; nothing to score")
    if version_2_with_negative and not scored:
        raise UserError(f"none of the {len(golds)} gold questions has a prediction; are these of another data set?")
    if null_odds is not None:
        _check_odds(scored, null_odds)
    scorer = Scorer(version_2_with_negative, language)
    for gold in golds:
        if gold.example_id not in predictions:
            scorer.add_missing(gold)
            continue
        scorer.add(gold, predictions[gold.example_id], None if null_odds is None else null_odds[gold.example_id])
    place = {gold.example_id: i for i, gold in enumerate(scored)}
    order = np.array([place[k] for k in null_odds if k in place], int) if null_odds else None
    extra = len(predictions.keys() - {gold.example_id for gold in golds})
    return scorer.result(threshold, order) | {"missing": len(golds) - len(scored), "extra": extra}


def _check_odds(golds: list[Gold], null_odds: Mapping[str, float]) -> None:
    without = [gold.example_id for gold in golds if gold.example_id not in null_odds]
    if without:
        raise UserError(
            f"the null odds lack {len(without)} questions that have a prediction (first: {without[0]}); "
            "give the null odds file that was written with these predictions"
        )


def _summed(exact: array[int], f1: array[float], counted: array[int], prefix: str) -> dict[str, Any]:
    total = sum(counted)
    return {
        f"{prefix}exact": _percent(sum(compress(exact, counted)), total),
        f"{prefix}f1": _percent(sum(compress(f1, counted)), total),
        f"{prefix}total": total,
    }


def _percent(part: float, total: int) -> float:
    return 100.0 * part / total
