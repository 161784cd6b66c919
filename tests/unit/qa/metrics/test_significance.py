"""Bootstrap intervals and the paired test against theory and full enumeration."""

import itertools

import numpy as np
import pytest

from qa_deepspeed.qa.metrics.significance import RESAMPLES, confidence_interval, paired_difference


def test_interval_is_normal_for_independent_questions():
    scores = np.random.default_rng(0).random(4000)
    low, high = confidence_interval(scores, np.arange(4000))
    half_width = 1.96 * scores.std() / np.sqrt(4000)
    assert low == pytest.approx(scores.mean() - half_width, abs=0.15 * half_width)
    assert high == pytest.approx(scores.mean() + half_width, abs=0.15 * half_width)


def test_dependent_questions_widen_the_interval():
    paragraph = np.repeat(np.arange(100), 10)
    scores = np.repeat(np.random.default_rng(1).integers(0, 2, 100), 10).astype(float)
    together = confidence_interval(scores, paragraph)
    apart = confidence_interval(scores, np.arange(1000))
    assert together.high - together.low > 2.5 * (apart.high - apart.low)


def test_lower_level_is_narrower_and_seed_is_deterministic():
    scores = np.random.default_rng(2).random(300)
    wide, narrow = (confidence_interval(scores, np.arange(300), level) for level in (0.95, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high
    assert confidence_interval(scores, np.arange(300)) == wide


def test_p_value_equals_full_enumeration():
    generator = np.random.default_rng(3)
    for _ in range(5):
        paragraph = np.repeat(np.arange(9), 3)
        a, b = generator.random((2, 27))
        sums = (b - a).reshape(9, 3).sum(axis=1)
        totals = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=9)]
        expected = np.mean(np.array(totals) >= abs(sums.sum()) - 1e-9)
        found = paired_difference(a, b, paragraph)
        assert found.p_value == pytest.approx(expected, abs=0.05)
        assert found.difference == pytest.approx((b - a).mean())
        assert found.interval.low < found.difference < found.interval.high


def test_equal_systems_have_no_difference():
    scores = np.random.default_rng(4).random(50)
    assert paired_difference(scores, scores, np.arange(50)) == (0.0, (0.0, 0.0), 1.0)


def test_the_p_value_counts_what_was_observed_as_one_of_the_resamples() -> None:
    """So it is never 0."""
    worse, better = np.zeros(200), np.ones(200)
    assert paired_difference(worse, better, np.arange(200)).p_value == 1 / (RESAMPLES + 1)
