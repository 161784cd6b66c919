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
    return _interval(_resampled_means(*_by_paragraph(scores, paragraph), seed), level)


def intervals_of_sums(sums: np.ndarray, counts: np.ndarray, level: float = 0.95, seed: int = 0) -> np.ndarray:
    """As `confidence_interval`, for the mean of several scores over several sets of questions, from the same resamples.

    Resamples that have no question of a set do not count for it; a set without any question has NaN.

    Args:
        sums: float [scores, paragraphs, sets], the summed score of each paragraph's questions that are in the set.
        counts: float [paragraphs, sets], the number of these questions.

    Returns:
        float [scores, sets, 2]: low and high end.
    """
    totals = _resampled_totals(np.concatenate((*sums, counts), axis=1), seed)
    *of_scores, questions = np.split(totals, len(sums) + 1, axis=1)
    ends = np.full((len(sums), counts.shape[1], 2), np.nan)
    for column in np.flatnonzero(counts.any(axis=0)):
        drawn = questions[:, column] > 0
        for score, total in enumerate(of_scores):
            ends[score, column] = _interval(total[drawn, column] / questions[drawn, column], level)
    return ends


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
    """The mean scores of RESAMPLES samples of paragraphs; [RESAMPLES]."""
    total, questions = _resampled_totals(np.stack((sums, counts), axis=1), seed).T
    means: np.ndarray = total / questions
    return means


def _resampled_totals(columns: np.ndarray, seed: int) -> np.ndarray:
    """Sums of columns [paragraphs, n] over RESAMPLES samples of paragraphs, drawn with replacement; [RESAMPLES, n]."""
    generator = np.random.default_rng(seed)
    paragraphs = len(columns)
    uniform = np.full(paragraphs, 1 / paragraphs)
    totals = []
    for begin in range(0, RESAMPLES, _RESAMPLES_AT_ONCE):
        times = generator.multinomial(paragraphs, uniform, min(_RESAMPLES_AT_ONCE, RESAMPLES - begin))
        totals.append(times.astype(np.float64) @ columns)  # two float arrays: BLAS multiplies them
    return np.concatenate(totals)


def _interval(means: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
