"""The page of a sweep: its settings by mean and spread, its runs, and the questions on which they disagree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qa_deepspeed.qa.metrics.compare import score_or_nothing
from qa_deepspeed.qa.metrics.prediction_files import GoldFile
from qa_deepspeed.qa.metrics.settings import RunScores
from qa_deepspeed.qa.report.analysis import slices_of
from qa_deepspeed.qa.report.comparison import SIGNIFICANT, only_place
from qa_deepspeed.qa.report.page import render
from qa_deepspeed.qa.report.questions import GivenAnswer, QuestionRecord, QuestionTable

TEMPLATE = "sweep.html.j2"

ALL_RIGHT, SOME_RIGHT, NONE_RIGHT = "all_right", "some_right", "none_right"

OUTCOMES = {
    SOME_RIGHT: ("Right in some runs", "the answer depends on setting or seed"),
    NONE_RIGHT: ("Right in no run", "no run has F1 100"),
    ALL_RIGHT: ("Right in all runs", "every run has F1 100"),
}

SYSTEMS_SHOWN = 4
"""Settings of which the table of questions shows an answer, that of their best run."""


def sweep_page(
    gold: GoldFile,
    runs: Sequence[RunScores],
    rows: Sequence[Mapping[str, Any]],
    tests: Sequence[Mapping[str, Any]],
    language: str,
    metric: str,
    about: Mapping[str, str],
) -> str:
    """The HTML document of a sweep.

    Args:
        rows: of `settings.summarize`; tests: of `settings.compare_with_best`. about: data, date and so on, by name.
    """
    table = QuestionTable(OUTCOMES)
    shown = [row["best_run"] for row in rows[:SYSTEMS_SHOWN]]
    counts: Counter[str] = Counter()
    for record in _records(gold, runs, shown, language):
        table.add(record)
        counts[record.outcome] += 1
    p_values = {test["setting"]: test for test in tests}
    return render(
        TEMPLATE,
        table,
        shown,
        title=f"Sweep of {len(runs)} runs",
        about=about,
        cards=_cards(rows, metric),
        verdict=sweep_verdict(rows, tests, metric),
        rows=[(row, p_values.get(row["setting"])) for row in rows],
        runs=sorted(runs, key=lambda run: -run.metrics[metric]),
        outcomes=[(key, *words, counts[key]) for key, words in OUTCOMES.items()],
    )


def sweep_verdict(rows: Sequence[Mapping[str, Any]], tests: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The best setting in words, and which of the others the questions tell from it."""
    name, best = _METRIC_NAMES[metric], rows[0]
    text = f"Best by mean {name}: {best['setting']}, {spread(best, metric)} over {_runs(len(best['runs']))}"
    if len(rows) == 1:
        return text
    same = [test["setting"] for test in tests if test["p_value"] >= SIGNIFICANT]
    if not tests:
        return f"{text}; whether others differ by more than chance is not known"
    if same:
        return f"{text}; without a significant difference from it (p >= {SIGNIFICANT}): {'; '.join(same)}"
    return f"{text}; every other setting is significantly worse (p < {SIGNIFICANT})"


_METRIC_NAMES = {"f1": "F1", "exact": "exact match"}


def spread(row: Mapping[str, Any], metric: str) -> str:
    """Mean and standard deviation of a setting; the mean alone of one run."""
    deviation = row[f"{metric}_std"]
    return f"{row[f'{metric}_mean']:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def _cards(rows: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, str]]:
    best = rows[0]
    name = _METRIC_NAMES[metric]
    top = max(rows, key=lambda row: float(row["best"]))
    deviation = best[f"{metric}_std"]
    spread_of_best = "one run: no spread is known" if deviation is None else f"standard deviation {deviation:.2f}"
    return [
        {
            "name": f"Mean {name} of the best setting",
            "value": f"{best[f'{metric}_mean']:.1f}",
            "interval": spread_of_best,
            "hint": str(best["setting"]),
        },
        {
            "name": f"{name} of the best run",
            "value": f"{top['best']:.1f}",
            "interval": "",
            "hint": f"{top['best_run']}; chosen among all, so that a new run of its setting is likely to score less",
        },
    ]


def _records(gold: GoldFile, runs: Sequence[RunScores], shown: Sequence[str], language: str) -> list[QuestionRecord]:
    records = []
    for question in {question.example_id: question for question in gold.questions}.values():
        example_id, context = question.example_id, gold.contexts[question.example_id]
        answers, right = {}, 0
        for run in runs:
            text = run.predictions.get(example_id)
            _, f1 = score_or_nothing(text, question.texts, gold.version_2, language)
            answers[run.name] = GivenAnswer(text or "", only_place(context, text or ""), f1)
            right += f1 == 1
        outcome = ALL_RIGHT if right == len(runs) else SOME_RIGHT if right else NONE_RIGHT
        records.append(
            QuestionRecord(
                example_id=example_id,
                question=gold.wording[example_id],
                context=context,
                golds=gold.places(question),
                answers=[answers[name] for name in shown],
                outcome=outcome,
                wrong=outcome == SOME_RIGHT,
                slices=slices_of(gold, question),
                file=gold.files.get(example_id, ""),
                note=f"right in {right} of {len(runs)} runs",
            )
        )
    return records
