"""Exact match and F1 by the rules of the official SQuAD v1.1 and v2.0 scripts, equal to the last digit.

v1.1: every question of the gold file counts; one without a prediction scores 0; an answer without a word has F1 0.
v2.0: gold texts that normalize to nothing are dropped; the correct answer to a question without gold texts is "";
questions without a prediction are excluded from the totals (and counted under `missing`).

Source: evaluate-v1.1.py and evaluate-v2.0.py at https://rajpurkar.github.io/SQuAD-explorer/. Sums use the same order
and the same operations as there.
"""

from __future__ import annotations

import functools
import operator
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qa_deepspeed.qa.metrics.normalization import normalized_tokens
from qa_deepspeed.qa.metrics.records import QuestionRecords
from qa_deepspeed.qa.metrics.thresholds import (
    ThresholdData,
    best_threshold,
    by_odds,
    cross_fitted,
    mean_score,
    official_best,
)
from qa_deepspeed.utils.errors import UserError


class Gold(NamedTuple):
    """A question's accepted answers; none if the context does not answer it."""

    example_id: str
    texts: tuple[str, ...]


def f1_of_tokens(gold: list[str], predicted: list[str]) -> float:
    """Harmonic mean of precision and recall over words with their multiplicities; 0 if they have none in common."""
    common = sum((Counter(gold) & Counter(predicted)).values())
    if not common:
        return 0.0
    precision = 1.0 * common / len(predicted)
    recall = 1.0 * common / len(gold)
    return (2 * precision * recall) / (precision + recall)


def score_answer(text: str, golds: tuple[str, ...], v2: bool, language: str = "en") -> tuple[int, float]:
    """Exact match (0 or 1) and F1 (0..1) of one answer, each the maximum over its gold texts."""
    predicted = normalized_tokens(text, language)
    accepted = [normalized_tokens(gold, language) for gold in golds]
    if v2:
        accepted = [tokens for tokens in accepted if tokens] or [[]]
    exact = int(any(tokens == predicted for tokens in accepted))
    if exact and (predicted or v2):
        return 1, 1.0
    return exact, max((f1_of_tokens(tokens, predicted) for tokens in accepted), default=0.0)


RECORD = np.dtype(
    [
        ("exact", "i1"),
        ("f1", "f8"),
        ("has_answer", "?"),
        ("given", "?"),  # the answer given is not ""
        # of the best span, regardless of the null odds; odds are NaN where unknown
        ("odds", "f8"),
        ("best_exact", "i1"),
        ("best_f1", "f8"),
        ("best_given", "?"),
        ("half", "?"),  # which half of the questions, by a hash of the id: for cross-fitting
    ]
)
"""The numbers recorded of each question."""


class Scorer:
    """Scores questions one at a time, recording a few bytes of each, and computes the metrics at the end."""

    def __init__(self, version_2_with_negative: bool, language: str = "en", folder: Path | None = None):
        """folder: where the records of many questions are spilled (`QuestionRecords`)."""
        self._v2 = version_2_with_negative
        self._language = language
        self._folder = folder
        self._records = QuestionRecords(RECORD, folder)
        self._with_odds = self._missing = self._missing_unanswerable = 0

    def add_missing(self, gold: Gold) -> None:
        """Count a question without a prediction."""
        self._missing += 1
        self._missing_unanswerable += not gold.texts

    def add(
        self, gold: Gold, text: str, null_odds: float | None = None, best_span_text: str | None = None
    ) -> tuple[int, float]:
        """Score one answer; returns its exact match and F1. Null odds must be given for all questions or for none.

        Args:
            text: the answer given, "" for none.
            best_span_text: the answer that low enough null odds would give, if known.
        """
        exact, f1 = best_exact, best_f1 = score_answer(text, gold.texts, self._v2, self._language)
        if not self._v2:
            self._records.append((exact, f1, True, bool(text), np.nan, 0, 0.0, False, False))
            return exact, f1
        best_text = text if best_span_text is None else best_span_text
        if null_odds is not None:
            self._with_odds += 1
            if best_text != text:
                best_exact, best_f1 = score_answer(best_text, gold.texts, self._v2, self._language)
        half = zlib.crc32(gold.example_id.encode("utf-8", "surrogatepass")) & 1
        odds = np.nan if null_odds is None else null_odds
        self._records.append(
            (exact, f1, bool(gold.texts), bool(text), odds, best_exact, best_f1, bool(best_text), half)
        )
        return exact, f1

    def part(self, questions: np.ndarray) -> Scorer:
        """A scorer of some of the questions with a prediction alone.

        Args:
            questions: bool `[questions]`, in the order of adding.
        """
        part = Scorer(self._v2, self._language, self._folder)
        begin = 0
        for chunk in self._records.chunks():
            for record in chunk[questions[begin : begin + len(chunk)]].tolist():
                part._records.append(record)
            begin += len(chunk)
        part._with_odds = len(part._records) if self._with_odds else 0
        return part

    def records(self) -> np.ndarray:
        """The records of all questions, `[questions]` with the fields of `RECORD`, memory-mapped if there are many."""
        return self._records.columns()

    def result(self, threshold: float | None = None, odds_order: np.ndarray | None = None) -> dict[str, Any]:
        """The metrics by name: exact, f1 (percent), total; for v2 also those of answerable questions (HasAns_) and of
        unanswerable ones (NoAns_); with null odds the best scores over all thresholds.

        Args:
            threshold: answers whose null odds exceed it count as ""; None leaves all answers unchanged.
            odds_order: int [questions], the order of the null odds file, if it differs from the order of adding.
        """
        if not self._v2:
            total = len(self._records) + self._missing
            exact = sum(int(chunk["exact"].sum()) for chunk in self._records.chunks())
            f1 = functools.reduce(operator.add, self._f1_values(), 0.0)  # the v1.1 script adds one by one
            return {"exact": _percent(exact, total), "f1": _percent(f1, total), "total": total}
        metrics: dict[str, Any] = {}
        for prefix, answerable in (("", None), ("HasAns_", True), ("NoAns_", False)):
            found = self._summed(answerable, threshold)
            if found["total"] or not prefix:
                metrics |= {f"{prefix}{name}": value for name, value in found.items()}
        assert self._with_odds in (0, len(self._records)), "null odds are given for all questions or for none"
        if self._with_odds:
            metrics |= self._threshold_metrics(odds_order)
        return metrics

    def _f1_values(self) -> Iterator[float]:
        return (value for chunk in self._records.chunks() for value in chunk["f1"].tolist())

    def _summed(self, answerable: bool | None, threshold: float | None) -> dict[str, Any]:
        """exact, f1 and total of answerable, unanswerable or all (None) questions, by the built-in `sum` as in the v2.0
        script."""
        exact_sum = total = 0

        def f1_values() -> Iterator[float]:
            nonlocal exact_sum, total
            for chunk in self._records.chunks():
                exact, f1 = chunk["exact"].astype(np.int64), chunk["f1"]
                if threshold is not None:
                    unanswered = chunk["odds"] > threshold
                    exact, f1 = (np.where(unanswered, ~chunk["has_answer"], scores) for scores in (exact, f1))
                chosen = slice(None) if answerable is None else chunk["has_answer"] == answerable
                exact_sum += int(exact[chosen].sum())
                total += len(exact[chosen])
                yield from f1[chosen].tolist()

        f1_sum = sum(f1_values())
        if not total:
            return {"total": 0}
        return {"exact": _percent(exact_sum, total), "f1": _percent(f1_sum, total), "total": total}

    def _threshold_metrics(self, odds_order: np.ndarray | None) -> dict[str, float]:
        """best_*: the official search on the answers given. tuned_*: the best that one threshold achieves on the best
        spans; equal odds are never separated. crossfit_*: each half of the questions with the other half's threshold.
        """
        metrics: dict[str, float] = {}
        records = self._records.columns()
        odds, has_answer = records["odds"], records["has_answer"]
        unanswerable = int((~has_answer).sum()) + self._missing_unanswerable
        order = by_odds(odds)
        official = order if odds_order is None else odds_order[by_odds(odds[odds_order])]
        for name in ("exact", "f1"):
            data = ThresholdData(odds, has_answer, records[name], records["given"])
            best, threshold = official_best(data, official, unanswerable)
            metrics[f"best_{name}"] = _percent(best, len(odds))
            metrics[f"best_{name}_thresh"] = threshold
        for name in ("exact", "f1"):
            data = ThresholdData(odds, has_answer, records[f"best_{name}"], records["best_given"])
            threshold = best_threshold(data, order)
            metrics[f"tuned_{name}"] = 100.0 * mean_score(data, threshold)
            metrics[f"tuned_{name}_thresh"] = threshold
            metrics[f"crossfit_{name}"] = 100.0 * cross_fitted(data, order, records["half"])
        return metrics


def score(
    golds: Iterable[Gold],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float] | None = None,
    threshold: float | None = None,
    *,
    version_2_with_negative: bool | None = None,
    language: str = "en",
    best_spans: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The metrics of answers by question id: those of `Scorer.result`, `missing` (questions without a prediction) and
    `extra` (predictions without a question).

    Args:
        golds: in the order of the file; of an id that occurs twice v2 counts the last entry only, as the script does.
        null_odds: in the order of their file, which breaks ties in the official search for the best threshold.
        threshold: answers whose null odds exceed it count as ""; None leaves the answers unchanged.
        best_spans: by question id the answer that low enough null odds would give, for tuned_* and crossfit_*; without
            it they are those of `predictions`, some of which may have been blanked by a threshold.
        version_2_with_negative: the rules; None for v2 if null odds are given or a question has no gold text.

    Raises:
        UserError: there is nothing to score, or a question with a prediction has no null odds.
    """
    golds = list(golds)
    if version_2_with_negative is None:
        version_2_with_negative = null_odds is not None or any(not gold.texts for gold in golds)
    if version_2_with_negative:
        golds = list({gold.example_id: gold for gold in golds}.values())
    scored = [gold for gold in golds if gold.example_id in predictions]
    if not golds:
        raise UserError("the gold file has no questions: nothing to score")
    if version_2_with_negative and not scored:
        raise UserError(f"none of the {len(golds)} gold questions has a prediction: are these from another data set?")
    if null_odds is not None:
        _check_odds(scored, null_odds)
    scorer = Scorer(version_2_with_negative, language)
    for gold in golds:
        if gold.example_id not in predictions:
            scorer.add_missing(gold)
            continue
        odds = None if null_odds is None else null_odds[gold.example_id]
        span = None if best_spans is None else best_spans[gold.example_id]
        scorer.add(gold, predictions[gold.example_id], odds, span)
    place = {gold.example_id: i for i, gold in enumerate(scored)}
    order = np.array([place[k] for k in null_odds if k in place], int) if null_odds else None
    extra = len(predictions.keys() - {gold.example_id for gold in golds})
    return scorer.result(threshold, order) | {"missing": len(golds) - len(scored), "extra": extra}


def _check_odds(golds: list[Gold], null_odds: Mapping[str, float]) -> None:
    without = [gold.example_id for gold in golds if gold.example_id not in null_odds]
    if without:
        raise UserError(
            f"the null odds lack {len(without)} questions that have a prediction (first: {without[0]}); "
            "pass the null odds file that was written with these predictions"
        )


def _percent(part: float, total: int) -> float:
    return 100.0 * part / total
