"""Answers are those of the pipeline of Transformers 4.57.6: a table of calls, on all questions of the real data.

Needs another environment, since Transformers 5 has no such pipeline, and a trained model:

    QA_DEEPSPEED_TRANSFORMERS_4=venv457/bin/python QA_DEEPSPEED_READER=runs/mine python -m pytest tests/contract
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.paths import DATA, needs_real_data

PYTHON = os.environ.get("QA_DEEPSPEED_TRANSFORMERS_4", "")
READER = os.environ.get("QA_DEEPSPEED_READER", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.timeout(7200),
    needs_real_data,
    pytest.mark.skipif(not PYTHON, reason="QA_DEEPSPEED_TRANSFORMERS_4 names no Python that has transformers 4.57.6"),
    pytest.mark.skipif(not READER, reason="QA_DEEPSPEED_READER names no folder of a trained model"),
]

CALLS: list[dict[str, Any]] = [
    {"every": 1},
    {"every": 1, "handle_impossible_answer": True},
    {"every": 8, "top_k": 3},
    {"every": 8, "top_k": 5, "handle_impossible_answer": True, "max_answer_len": 30},
    {"every": 8, "align_to_words": False},
    {"every": 8, "align_to_words": False, "top_k": 4},
    {"every": 8, "max_answer_len": 1},
    {"every": 8, "max_seq_len": 128, "doc_stride": 64},
    {"every": 8, "max_seq_len": 96, "doc_stride": 16, "handle_impossible_answer": True, "top_k": 2},
]
"""Keyword arguments, and of how many questions one is asked."""

TOLERANCE = 1e-4
NEAR_TIE = 2e-5
"""Scores so near each other that the rounding of another order of summing can put either first."""


def questions_of(path: Path) -> tuple[list[str], list[str]]:
    pairs = [
        (question["question"], paragraph["context"])
        for article in json.loads(path.read_text())["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    return [question for question, _ in pairs], [context for _, context in pairs]


def difference(theirs: Any, ours: Any) -> str | None:
    """None if two results are the same, else by what named reason they differ, or "" for none."""
    theirs, ours = ([one] if isinstance(one, dict) else one for one in (theirs, ours))
    if len(theirs) != len(ours):
        return ""
    if any(abs(one["score"] - other["score"]) > TOLERANCE for one, other in zip(theirs, ours, strict=True)):
        return ""
    places = [[(one["answer"], one["start"], one["end"]) for one in answers] for answers in (theirs, ours)]
    if places[0] == places[1]:
        return None
    for index, (one, other) in enumerate(zip(*places, strict=True)):
        if one == other:
            continue
        neighbours = [answer["score"] for answer in theirs]
        tied = any(abs(neighbours[index] - score) < NEAR_TIE for n, score in enumerate(neighbours) if n != index)
        if not (tied and one in places[1] and other in places[0]):
            return ""
    return "near tie"


@pytest.mark.parametrize("name", ["en-v1-dev.json", "en-v2-dev.json"])
def test_answers_are_those_of_the_old_pipeline(name: str, tmp_path: Path) -> None:
    from qa_deepspeed import QuestionAnswerer

    questions, contexts = questions_of(DATA / name)
    work = {"model": READER, "questions": questions, "contexts": contexts, "calls": CALLS}
    script = Path(__file__).with_name("old_pipeline.py")
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run(
        [PYTHON, str(script), str(tmp_path / "old.json")],
        input=json.dumps(work),
        text=True,
        check=True,
        env={**kept, "HF_HUB_OFFLINE": "1"},
    )
    old = json.loads((tmp_path / "old.json").read_text())
    assert old["transformers"] == "4.57.6"
    answerer = QuestionAnswerer.from_pretrained(READER, device="cpu", dtype="float32")
    for call, result in zip(CALLS, old["results"], strict=True):
        arguments = {key: value for key, value in call.items() if key != "every"}
        every = call["every"]
        ours = answerer(question=questions[::every], context=contexts[::every], **arguments)
        verdicts = [difference(*pair) for pair in zip(result["answers"], ours, strict=True)]
        reasons = Counter(verdict for verdict in verdicts if verdict is not None)
        furthest = max(
            abs(one["score"] - other["score"])
            for pair in zip(result["answers"], ours, strict=True)
            for one, other in zip(*([side] if isinstance(side, dict) else side for side in pair), strict=False)
        )
        print(f"{name} {call}: {len(ours)} questions, furthest score {furthest:.1e}, differences {dict(reasons)}")
        unexplained = [(t, o) for t, o, v in zip(result["answers"], ours, verdicts, strict=True) if v == ""]
        assert not unexplained, unexplained[:3]
        assert sum(reasons.values()) <= len(ours) / 100
