"""A report whose texts all contain markup."""

from __future__ import annotations

from typing import Any

from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.decoding.predictions import Prediction, columns_of
from qa_deepspeed.qa.metrics.squad import Gold, Scorer
from qa_deepspeed.qa.report.analysis import Analysis

HOSTILE = "<script>alert('x')</script> | \"&\" `b` \\"


def hostile_report() -> dict[str, Any]:
    """`Analysis.report` with `metrics`, on 40 questions of v2.0 data."""
    scorer, analysis = Scorer(True), Analysis(True)
    for i in range(40):
        answers = (Answer("right", 0),) if i % 3 else ()
        example = Example(f"q{i}{HOSTILE}", f"what is {HOSTILE} \ud83d?", f"right or {HOSTILE} {i // 5}", answers)
        text = ["right", HOSTILE, ""][i % 4 % 3]
        prediction = Prediction(example.example_id, text, columns_of([(text, i / 40, 1.0, 1.0, 9)]), i - 20.0)
        gold = Gold(example.example_id, tuple(answer.text for answer in answers))
        scores = scorer.add(gold, text, prediction.null_odds, prediction.best_span_text)
        analysis.add(example, prediction, 1 + i % 2, *scores)
    return {"metrics": scorer.result(), **analysis.report(scorer.records())}
