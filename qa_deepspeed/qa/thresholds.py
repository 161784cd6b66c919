"""The threshold on null odds above which no answer is given: the official search, and one that can be lived by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class ThresholdData:
    """What the search needs of each scored question with known null odds; arrays are [questions]."""

    odds: np.ndarray  # float64 null odds; a question is answered while they do not exceed the threshold
    has_answer: np.ndarray  # bool, the question is answerable
    answered_score: np.ndarray  # in 0..1, what the answer earns if given
    given: np.ndarray  # bool, the answer is not ""

    def take(self, index: np.ndarray) -> ThresholdData:
        return ThresholdData(self.odds[index], self.has_answer[index], self.answered_score[index], self.given[index])

    @property
    def silent_score(self) -> np.ndarray:
        """What each question earns when nothing is answered."""
        return np.where(self.has_answer, 0.0, 1.0)


def official_best(data: ThresholdData, unanswerable: int) -> tuple[float, float]:
    """Best summed score and its threshold as the official v2.0 script finds them (`find_best_thresh`).

    The script goes through the questions by rising odds, equal ones in file order, as if a threshold could part
    equal odds; it names 0.0 for answering nothing; an answer to an unanswerable question costs 1 whatever it says.

    Args:
        data: in the order of the null odds file.
        unanswerable: number of unanswerable questions in the gold file.
    """
    order = np.argsort(data.odds, kind="stable")
    change = np.where(data.has_answer, data.answered_score, np.where(data.given, -1.0, 0.0))[order]
    total = np.cumsum(np.concatenate(([float(unanswerable)], change)))
    best = int(np.argmax(total))
    return float(total[best]), float(data.odds[order[best - 1]]) if best else 0.0


def best_threshold(data: ThresholdData) -> float:
    """The threshold that scores most on these questions: the lowest such of the odds that occur, or one just below
    them all if answering nothing is best. Questions of equal odds are answered together or not at all.
    """
    if not len(data.odds):
        return 0.0
    order = np.argsort(data.odds, kind="stable")
    odds = data.odds[order]
    gain = (data.answered_score - data.silent_score)[order]
    last_of_equals = np.append(odds[1:] != odds[:-1], True)
    total = np.concatenate(([0.0], np.cumsum(gain)[last_of_equals]))
    best = int(np.argmax(total))
    return float(odds[last_of_equals][best - 1]) if best else float(np.nextafter(odds[0], -np.inf))


def scores_at(data: ThresholdData, threshold: float | np.ndarray) -> np.ndarray:
    """What each question earns with this threshold (a number, or one per question); float64 [questions]."""
    return np.where(data.odds > threshold, data.silent_score, data.answered_score)


def cross_fitted(data: ThresholdData, half: np.ndarray) -> np.ndarray:
    """What each question earns when the threshold is tuned on the other half. `half` is bool [questions]."""
    threshold = np.where(half, best_threshold(data.take(~half)), best_threshold(data.take(half)))
    return scores_at(data, threshold)
