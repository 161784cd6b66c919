"""Tuning the null threshold: the null odds above which the answer is "". The official search, and one to use.

The official search may separate equal null odds, which no threshold can; `best_threshold` keeps them together.
Questions are processed in chunks, so that memory-mapped columns are never in memory as a whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qa_deepspeed.utils.files import mapped_array

QUESTIONS_AT_ONCE = 65536


@dataclass
class ThresholdData:
    """The input of the search: all scored questions with null odds; arrays are [questions], memory-mapped if large."""

    odds: np.ndarray  # float64 null odds; a question is answered if they do not exceed the threshold
    has_answer: np.ndarray  # bool, the question is answerable
    answered_score: np.ndarray  # in 0..1, the score if the answer is given
    given: np.ndarray  # bool, the answer is not ""

    def chunk(self, index: np.ndarray) -> ThresholdData:
        """The questions of `index` (int)."""
        return ThresholdData(self.odds[index], self.has_answer[index], self.answered_score[index], self.given[index])

    @property
    def unanswered_score(self) -> np.ndarray:
        """The score of each question if it is not answered."""
        return np.where(self.has_answer, 0.0, 1.0)


def by_odds(odds: np.ndarray) -> np.ndarray:
    """The questions by ascending odds, equal ones in their order; int32 [questions].

    Many questions are sorted in an unnamed file, as complex numbers (odds, position), which numpy sorts by the real and
    then the imaginary part.
    """
    if len(odds) <= QUESTIONS_AT_ONCE:
        return np.argsort(odds, kind="stable").astype(np.int32)
    parts = [slice(begin, begin + QUESTIONS_AT_ONCE) for begin in range(0, len(odds), QUESTIONS_AT_ONCE)]
    order = np.empty(len(odds), np.int32)
    keys = mapped_array(Path(tempfile.gettempdir()), np.dtype(np.complex128), len(odds))
    for part in parts:
        keys.real[part] = odds[part]
        keys.imag[part] = np.arange(part.start, min(part.stop, len(odds)))
    keys.sort()
    for part in parts:
        order[part] = keys.imag[part]
    return order


def official_best(data: ThresholdData, order: np.ndarray, unanswerable: int) -> tuple[float, float]:
    """Best summed score and its threshold as the official v2.0 script finds them (`find_best_thresh`).

    The script visits the questions by ascending odds, equal ones in file order, as if a threshold could separate equal
    odds; its threshold for answering nothing is 0.0; any answer to an unanswerable question costs 1.

    Args:
        order: int [questions], by ascending odds, equal ones in the order of the null odds file.
        unanswerable: number of unanswerable questions in the gold file.
    """
    total = best = float(unanswerable)
    threshold = 0.0
    for part in _in_order(data, order):
        change = np.where(part.has_answer, part.answered_score, np.where(part.given, -1.0, 0.0))
        totals = np.cumsum(np.concatenate(([total], change)))[1:]  # added one by one, as there
        highest = int(np.argmax(totals))
        if totals[highest] > best:
            best, threshold = float(totals[highest]), float(part.odds[highest])
        total = float(totals[-1])
    return best, threshold


def best_threshold(data: ThresholdData, order: np.ndarray) -> float:
    """The threshold with the highest score on the questions of `order`: the lowest such among their odds, or a number
    just below all of them if answering nothing is best. Questions with equal odds are all answered or all not.

    Args:
        order: int, some or all of the questions, by ascending odds.
    """
    if not len(order):
        return 0.0
    threshold = float(np.nextafter(data.odds[order[0]], -np.inf))
    total = best = 0.0
    done = 0
    for part in _in_order(data, order):
        done += len(part.odds)
        following = data.odds[order[done]] if done < len(order) else np.nan  # NaN differs from every number
        last_of_equals = np.append(part.odds[1:], following) != part.odds
        totals = np.cumsum(np.concatenate(([total], part.answered_score - part.unanswered_score)))[1:]
        total = float(totals[-1])
        totals = np.where(last_of_equals, totals, -np.inf)
        highest = int(np.argmax(totals))
        if totals[highest] > best:
            best, threshold = float(totals[highest]), float(part.odds[highest])
    return threshold


def mean_score(data: ThresholdData, threshold: float, questions: np.ndarray | None = None) -> float:
    """The mean score with this threshold over `questions` (int), or over all."""
    questions = np.arange(len(data.odds), dtype=np.int32) if questions is None else questions
    total = 0.0
    for part in _in_order(data, questions):
        total += float(np.where(part.odds > threshold, part.unanswered_score, part.answered_score).sum())
    return total / len(questions) if len(questions) else 0.0


def cross_fitted(data: ThresholdData, order: np.ndarray, half: np.ndarray) -> float:
    """The mean score if each half of the questions uses the threshold that was tuned on the other half.

    Args:
        order: int [questions], by ascending odds. half: bool [questions].
    """
    inside = half[order]
    first, second = order[inside], order[~inside]
    of_first = mean_score(data, best_threshold(data, second), first)
    of_second = mean_score(data, best_threshold(data, first), second)
    return (of_first * len(first) + of_second * len(second)) / len(order)


def _in_order(data: ThresholdData, order: np.ndarray) -> Iterator[ThresholdData]:
    for begin in range(0, len(order), QUESTIONS_AT_ONCE):
        yield data.chunk(order[begin : begin + QUESTIONS_AT_ONCE])
