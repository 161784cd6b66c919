"""The searches for a threshold against loops over all thresholds, over data of many chunks with many equal odds."""

from __future__ import annotations

import numpy as np
import pytest

from qa_deepspeed.qa.metrics import thresholds
from qa_deepspeed.qa.metrics.thresholds import (
    ThresholdData,
    best_threshold,
    by_odds,
    cross_fitted,
    mean_score,
    official_best,
)

CASES = [(seed, count) for seed in range(6) for count in (1, 4, 5, 6, 37)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five questions are a chunk."""
    monkeypatch.setattr(thresholds, "QUESTIONS_AT_ONCE", 5)


def random_data(seed: int, count: int) -> ThresholdData:
    """Questions with few distinct odds and scores in eighths, so that sums are exact."""
    random = np.random.default_rng(seed)
    odds = random.integers(-4, 5, count) / 2.0
    score, answerable, given = random.integers(0, 9, count) / 8, random.random(count) < 0.6, random.random(count) < 0.8
    return ThresholdData(odds, answerable, np.where(answerable, score, 0.0), given)


def mean_at(data: ThresholdData, threshold: float, questions: list[int]) -> float:
    """The mean score with a threshold, question by question."""
    scores = [
        data.answered_score[one] if data.odds[one] <= threshold else float(not data.has_answer[one])
        for one in questions
    ]
    return sum(scores) / len(scores) if scores else 0.0


def lowest_best(data: ThresholdData, questions: list[int]) -> float:
    """The lowest of the best thresholds among the odds and one below all of them."""
    if not questions:
        return 0.0
    odds = sorted({float(data.odds[one]) for one in questions})
    choices = [float(np.nextafter(odds[0], -np.inf)), *odds]
    return max(choices, key=lambda choice: (mean_at(data, choice, questions), -choice))


@pytest.mark.parametrize(("seed", "count"), CASES)
def test_order_is_by_odds_and_stable(seed: int, count: int) -> None:
    odds = random_data(seed, count).odds
    assert by_odds(odds).tolist() == sorted(range(count), key=lambda one: (odds[one], one))


@pytest.mark.parametrize(("seed", "count"), CASES)
def test_the_official_search_is_find_best_thresh(seed: int, count: int) -> None:
    """The loop of evaluate-v2.0.py, in its order of the questions."""
    data = random_data(seed, count)
    order = np.random.default_rng(seed).permutation(count)
    order = order[by_odds(data.odds[order])]
    score = best = int((~data.has_answer).sum()) + 2
    threshold = 0.0
    for one in order:
        change = data.answered_score[one] if data.has_answer[one] else (-1 if data.given[one] else 0)
        score += change
        if score > best:
            best, threshold = score, data.odds[one]
    assert official_best(data, order, int((~data.has_answer).sum()) + 2) == (best, threshold)


@pytest.mark.parametrize(("seed", "count"), CASES)
def test_the_tuned_threshold_is_the_lowest_of_the_best(seed: int, count: int) -> None:
    data = random_data(seed, count)
    found = best_threshold(data, by_odds(data.odds))
    assert found == lowest_best(data, list(range(count)))
    assert mean_score(data, found) == pytest.approx(mean_at(data, found, list(range(count))))


def test_equal_odds_on_both_sides_of_a_chunks_border_stay_together() -> None:
    """Four right answers, then one right and three wrong ones with the same odds: the last of these do not pay."""
    answerable = np.array([True] * 5 + [False] * 3)
    data = ThresholdData(
        np.array([0.0, 1, 2, 3, 4, 4, 4, 4]), answerable, answerable.astype(float), np.ones(8, dtype=bool)
    )
    assert best_threshold(data, by_odds(data.odds)) == 3.0


@pytest.mark.parametrize(("seed", "count"), CASES)
def test_each_half_uses_the_threshold_of_the_other(seed: int, count: int) -> None:
    data = random_data(seed, count)
    half = np.random.default_rng(seed + 100).random(count) < 0.3
    first, second = (np.flatnonzero(half == side).tolist() for side in (True, False))
    right = sum(
        mean_at(data, lowest_best(data, other), own) * len(own) for own, other in ((first, second), (second, first))
    )
    assert cross_fitted(data, by_odds(data.odds), half) == pytest.approx(right / count)
