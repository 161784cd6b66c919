"""Settings of a sweep, each trained with several seeds: mean and spread over the seeds, and tests by question.

Two sources of chance are kept apart: the standard deviation says how much the score of a setting changes with the seed,
the paired test (`significance.paired_difference`) how much it may change with the questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qa_deepspeed.qa.metrics.compare import paragraph_numbers, score_or_nothing
from qa_deepspeed.qa.metrics.prediction_files import GoldFile
from qa_deepspeed.qa.metrics.significance import paired_difference

METRICS = ("f1", "exact")


@dataclass(frozen=True)
class RunScores:
    """One finished run of a sweep: its name, what it was set to, its metrics (percent) and its answers by question."""

    name: str
    setting: str
    metrics: Mapping[str, float]
    predictions: Mapping[str, str]


def summarize(runs: Sequence[RunScores], metric: str) -> list[dict[str, Any]]:
    """One row a setting, the best first: its runs, mean, standard deviation and best run by `metric`.

    `f1_mean`, `f1_std`, `exact_mean` and `exact_std` are in percent; the standard deviation is that of a sample (its
    sum of squares over one run less), None for a single run.
    """
    rows = []
    for setting in dict.fromkeys(run.setting for run in runs):
        own = [run for run in runs if run.setting == setting]
        row: dict[str, Any] = {"setting": setting, "runs": [run.name for run in own]}
        for name in METRICS:
            values = np.array([run.metrics[name] for run in own])
            row[f"{name}_mean"] = float(values.mean())
            row[f"{name}_std"] = float(values.std(ddof=1)) if len(own) > 1 else None
        best = max(own, key=lambda run: run.metrics[metric])
        rows.append({**row, "best_run": best.name, "best": best.metrics[metric]})
    return sorted(rows, key=lambda row: -float(row[f"{metric}_mean"]))


def question_scores(gold: GoldFile, runs: Sequence[RunScores], language: str, metric: str) -> np.ndarray:
    """Scores of every run on every question, float `[runs, questions]` in 0..1; 0 where a run has no answer."""
    questions = {question.example_id: question for question in gold.questions}.values()
    column = METRICS.index(metric)  # score_or_nothing gives exact match first
    scores = [
        [
            score_or_nothing(run.predictions.get(one.example_id), one.texts, gold.version_2, language)[1 - column]
            for one in questions
        ]
        for run in runs
    ]
    return np.array(scores, float)


def compare_with_best(
    gold: GoldFile, runs: Sequence[RunScores], rows: Sequence[Mapping[str, Any]], language: str, metric: str
) -> list[dict[str, Any]]:
    """For each setting but the best: what it has less than the best, with interval and p value, in percent.

    A question's score is its mean over the runs of a setting. `rows`: of `summarize`, the best first.
    """
    scores = question_scores(gold, runs, language, metric)
    example_ids = list({question.example_id: question for question in gold.questions})
    paragraph = paragraph_numbers(gold, example_ids)
    of_setting = {row["setting"]: scores[[run.setting == row["setting"] for run in runs]].mean(axis=0) for row in rows}
    best = of_setting[rows[0]["setting"]]
    tests = []
    for row in rows[1:]:
        paired = paired_difference(best, of_setting[row["setting"]], paragraph)
        ends = [100 * paired.interval.low, 100 * paired.interval.high]
        tests.append(
            {
                "setting": row["setting"],
                "difference": 100 * paired.difference,
                "interval": ends,
                "p_value": paired.p_value,
            }
        )
    return tests
