"""An evaluation whose texts all contain markup."""

from __future__ import annotations

from typing import Any

import numpy as np

from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.decoding.predictions import Prediction, columns_of
from qa_deepspeed.qa.report.result import EvaluationResult, ResultBuilder

HOSTILE = "</script><script>alert('x')</script><!-- ]]> | \"&\" `b` \\ \u2028"


def hostile_result() -> EvaluationResult:
    """40 questions of v2.0 data."""
    examples, predictions = [], []
    for i in range(40):
        answers = (Answer("right", 0),) if i % 3 else ()
        examples.append(
            Example(f"q{i}{HOSTILE}", f"what is {HOSTILE} \ud83d?", f"right or {HOSTILE} {i // 5}", answers)
        )
        text = ["right", HOSTILE, ""][i % 4 % 3]
        predictions.append(
            Prediction(examples[-1].example_id, text, columns_of([(text, i / 40, 1.0, 1.0, 9)]), i - 20.0)
        )
    files = ("dev.json", f"{HOSTILE}.json")
    builder = ResultBuilder(True, "en", len(examples), None, files, np.arange(len(examples)) % 2)
    list(builder.observe(examples, predictions, [1 + i % 2 for i in range(40)]))
    result = builder.result(builder.metrics())
    assert result is not None
    return result


def hostile_report() -> dict[str, Any]:
    """The content of report.json."""
    return hostile_result().report
