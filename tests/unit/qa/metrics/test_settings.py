"""Mean, spread and tests of settings, beside plain arithmetic."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from qa_deepspeed.qa.metrics.prediction_files import GoldFile
from qa_deepspeed.qa.metrics.settings import RunScores, compare_with_best, question_scores, summarize
from qa_deepspeed.qa.metrics.significance import paired_difference
from qa_deepspeed.qa.metrics.squad import Gold

QUESTIONS = 30


def gold_of() -> GoldFile:
    names = [f"q{number}" for number in range(QUESTIONS)]
    return GoldFile(
        [Gold(name, ("red fox",)) for name in names],
        False,
        {name: f"context {number // 3}" for number, name in enumerate(names)},
        dict.fromkeys(names, "What?"),
        [],
        {name: (-1,) for name in names},
    )


def runs_of() -> list[RunScores]:
    """Four settings; the answers of the second are right more often, but the best run is one of the last."""
    generator = np.random.default_rng(1)
    made = []
    chances = {"low": (0.3, 0.3), "high": (0.9, 0.9, 0.9), "one": (0.8,), "lucky": (1.0, 0.1)}
    for setting, of_seeds in chances.items():
        for seed, chance in enumerate(of_seeds):
            right = generator.random(QUESTIONS) < chance
            answers = {f"q{number}": "red fox" if ok else "fox" for number, ok in enumerate(right)}
            del answers["q7"]  # a question without an answer is wrong
            right[7] = False
            f1 = [1.0 if ok else 0.0 if number == 7 else 2 / 3 for number, ok in enumerate(right)]
            metrics = {"f1": 100 * float(np.mean(f1)), "exact": 100 * float(right.mean())}
            made.append(RunScores(f"{setting}-{seed}", setting, metrics, answers))
    return made


@pytest.mark.parametrize("metric", ["f1", "exact"])
def test_mean_deviation_and_best(metric: str) -> None:
    runs = runs_of()
    rows = summarize(runs, metric)
    assert [row[f"{metric}_mean"] for row in rows] == sorted((row[f"{metric}_mean"] for row in rows), reverse=True)
    for row in rows:
        own = [run.metrics[metric] for run in runs if run.setting == row["setting"]]
        assert row[f"{metric}_mean"] == pytest.approx(statistics.mean(own))
        assert row["best"] == max(own) and row["best_run"].startswith(row["setting"])
        if len(own) > 1:
            assert row[f"{metric}_std"] == pytest.approx(statistics.stdev(own))
        else:
            assert row[f"{metric}_std"] is None


@pytest.mark.parametrize("metric", ["f1", "exact"])
def test_scores_of_questions_have_the_runs_metrics_as_their_mean(metric: str) -> None:
    runs = runs_of()
    scores = question_scores(gold_of(), runs, "en", metric)
    assert scores.shape == (len(runs), QUESTIONS)
    np.testing.assert_allclose(100 * scores.mean(axis=1), [run.metrics[metric] for run in runs])


def test_settings_are_tested_by_the_means_of_their_runs() -> None:
    gold, runs = gold_of(), runs_of()
    rows = summarize(runs, "f1")
    tests = compare_with_best(gold, runs, rows, "en", "f1")
    assert [test["setting"] for test in tests] == [row["setting"] for row in rows[1:]]
    scores = question_scores(gold, runs, "en", "f1")
    means = {
        name: scores[[run.setting == name for run in runs]].mean(axis=0) for name in ("low", "high", "one", "lucky")
    }
    paragraph = np.arange(QUESTIONS) // 3
    for test in tests:
        expected = paired_difference(means[rows[0]["setting"]], means[test["setting"]], paragraph)
        assert test["difference"] == pytest.approx(100 * expected.difference) and test["difference"] < 0
        assert test["p_value"] == expected.p_value
    assert next(test for test in tests if test["setting"] == "low")["p_value"] < 0.05
