"""Sampling error of scores: bootstrap confidence intervals and a paired randomisation test.

Questions of one paragraph tend to be right or wrong together, so paragraphs are resampled, not questions (cluster
bootstrap; Davison and Hinkley 1997, chapter 3.8). The test counts how often random swaps of the two systems' scores,
paragraph by paragraph, give a difference of means at least as large as the observed one (Noreen 1989; Yeh 2000).
Everything is seeded: the same scores give the same results.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
_RESAMPLES_AT_ONCE = 100  # bounds memory to this many weights per paragraph


class Interval(NamedTuple):
    low: float
    high: float


class PairedDifference(NamedTuple):
    """B minus A, in the unit of the scores; p_value is two-sided."""

    difference: float
    interval: Interval
    p_value: float


def confidence_interval(scores: np.ndarray, paragraph: np.ndarray, level: float = 0.95, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of the mean score.

    Args:
        scores: float [questions].
        paragraph: int [questions], the number of each question's paragraph.
        level: the fraction of resamples inside the interval.
    """
    return interval_of_sums(*_by_paragraph(scores, paragraph), level, seed)


def interval_of_sums(sums: np.ndarray, counts: np.ndarray, level: float = 0.95, seed: int = 0) -> Interval:
    """As `confidence_interval`, from each paragraph's summed score and number of questions; float [paragraphs] each."""
    return _interval(_resampled_means(sums, counts, seed), level)


def paired_difference(
    scores_a: np.ndarray, scores_b: np.ndarray, paragraph: np.ndarray, level: float = 0.95, seed: int = 0
) -> PairedDifference:
    """Mean of B minus mean of A over the same questions (float [questions]), its interval and its p value."""
    sums, counts = _by_paragraph(scores_b - scores_a, paragraph)
    observed = float(sums.sum())
    generator = np.random.default_rng(seed)
    extreme = 0
    for begin in range(0, RESAMPLES, _RESAMPLES_AT_ONCE):
        signs = generator.integers(0, 2, (min(_RESAMPLES_AT_ONCE, RESAMPLES - begin), len(sums)), np.int8) * 2 - 1
        extreme += int((np.abs(signs @ sums) >= abs(observed) - 1e-9).sum())
    # the observed arrangement counts as one of them, so that the p value is never 0
    p_value = (extreme + 1) / (RESAMPLES + 1)
    interval = _interval(_resampled_means(sums, counts, seed), level)
    return PairedDifference(observed / len(scores_a), interval, p_value)


def _by_paragraph(scores: np.ndarray, paragraph: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    number = np.unique(paragraph, return_inverse=True)[1]
    return np.bincount(number, weights=scores), np.bincount(number).astype(float)


def _resampled_means(sums: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """The mean scores of RESAMPLES samples of paragraphs, drawn with replacement; [RESAMPLES]."""
    generator = np.random.default_rng(seed)
    uniform = np.full(len(sums), 1 / len(sums))
    means = []
    for begin in range(0, RESAMPLES, _RESAMPLES_AT_ONCE):
        times = generator.multinomial(len(sums), uniform, min(_RESAMPLES_AT_ONCE, RESAMPLES - begin))
        means.append((times @ sums) / (times @ counts))
    return np.concatenate(means)


def _interval(means: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
