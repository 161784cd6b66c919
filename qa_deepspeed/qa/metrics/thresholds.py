"""The threshold on null odds above which no answer is given: the official search, and one that can be lived by.

Questions are gone through a chunk at a time, so that mapped columns are not read into memory as a whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

QUESTIONS_AT_ONCE = 65536


@dataclass
class ThresholdData:
    """What the search needs of each scored question with known null odds; arrays are [questions], perhaps mapped."""

    odds: np.ndarray  # float64 null odds; a question is answered while they do not exceed the threshold
    has_answer: np.ndarray  # bool, the question is answerable
    answered_score: np.ndarray  # in 0..1, what the answer earns if given
    given: np.ndarray  # bool, the answer is not ""

    def chunk(self, index: np.ndarray) -> ThresholdData:
        return ThresholdData(self.odds[index], self.has_answer[index], self.answered_score[index], self.given[index])

    @property
    def silent_score(self) -> np.ndarray:
        """What each question earns when nothing is answered."""
        return np.where(self.has_answer, 0.0, 1.0)


def by_odds(odds: np.ndarray) -> np.ndarray:
    """The questions by rising odds, equal ones in their order; int32 [questions].

    Many are sorted in an unnamed file, as complex numbers of odds and place, which sort by the one and then the other.
    """
    if len(odds) <= QUESTIONS_AT_ONCE:
        return np.argsort(odds, kind="stable").astype(np.int32)
    parts = [slice(begin, begin + QUESTIONS_AT_ONCE) for begin in range(0, len(odds), QUESTIONS_AT_ONCE)]
    order = np.empty(len(odds), np.int32)
    with tempfile.TemporaryFile() as file:
        keys = np.memmap(file, np.complex128, "w+", shape=(len(odds),))
        for part in parts:
            keys.real[part] = odds[part]
            keys.imag[part] = np.arange(part.start, min(part.stop, len(odds)))
        keys.sort()
        for part in parts:
            order[part] = keys.imag[part]
    return order


def official_best(data: ThresholdData, order: np.ndarray, unanswerable: int) -> tuple[float, float]:
    """Best summed score and its threshold as the official v2.0 script finds them (`find_best_thresh`).

    The script goes through the questions by rising odds, equal ones in file order, as if a threshold could part
    equal odds; it names 0.0 for answering nothing; an answer to an unanswerable question costs 1 whatever it says.

    Args:
        order: int [questions], by rising odds, equal ones in the order of the null odds file.
        unanswerable: number of unanswerable questions in the gold file.
    """
    total = best = float(unanswerable)
    threshold = 0.0
    for part in _in_order(data, order):
        change = np.where(part.has_answer, part.answered_score, np.where(part.given, -1.0, 0.0))
        totals = np.cumsum(np.concatenate(([total], change)))[1:]  # added up one by one, as there
        highest = int(np.argmax(totals))
        if totals[highest] > best:
            best, threshold = float(totals[highest]), float(part.odds[highest])
        total = float(totals[-1])
    return best, threshold


def best_threshold(data: ThresholdData, order: np.ndarray) -> float:
    """The threshold that scores most on the questions of `order`: the lowest such of the odds that occur, or one just
    below them all if answering nothing is best. Questions of equal odds are answered together or not at all.

    Args:
        order: int, some or all of the questions, by rising odds.
    """
    if not len(order):
        return 0.0
    threshold = float(np.nextafter(data.odds[order[0]], -np.inf))
    total = best = 0.0
    done = 0
    for part in _in_order(data, order):
        done += len(part.odds)
        following = data.odds[order[done]] if done < len(order) else np.nan  # differs from everything
        last_of_equals = np.append(part.odds[1:], following) != part.odds
        totals = np.cumsum(np.concatenate(([total], part.answered_score - part.silent_score)))[1:]
        total = float(totals[-1])
        totals = np.where(last_of_equals, totals, -np.inf)
        highest = int(np.argmax(totals))
        if totals[highest] > best:
            best, threshold = float(totals[highest]), float(part.odds[highest])
    return threshold


def mean_score(data: ThresholdData, threshold: float, questions: np.ndarray | None = None) -> float:
    """The mean score with this threshold over some of the questions (int), or all."""
    questions = np.arange(len(data.odds), dtype=np.int32) if questions is None else questions
    earned = 0.0
    for part in _in_order(data, questions):
        earned += float(np.where(part.odds > threshold, part.silent_score, part.answered_score).sum())
    return earned / len(questions) if len(questions) else 0.0


def cross_fitted(data: ThresholdData, order: np.ndarray, half: np.ndarray) -> float:
    """The mean score when each half of the questions has the threshold that was tuned on the other half.

    Args:
        order: int [questions], by rising odds. half: bool [questions].
    """
    inside = half[order]
    first, second = order[inside], order[~inside]
    of_first = mean_score(data, best_threshold(data, second), first)
    of_second = mean_score(data, best_threshold(data, first), second)
    return (of_first * len(first) + of_second * len(second)) / len(order)


def _in_order(data: ThresholdData, order: np.ndarray) -> Iterator[ThresholdData]:
    for begin in range(0, len(order), QUESTIONS_AT_ONCE):
        yield data.chunk(order[begin : begin + QUESTIONS_AT_ONCE])
