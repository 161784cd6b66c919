"""An evaluation question by question, put together from the files it left: for curves, histograms and samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.decoding.predictions import NBEST_FILE, NULL_ODDS_FILE, PREDICTIONS_FILE
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.qa.metrics.question_scores import QuestionScores, gold_texts, score_questions
from qa_deepspeed.qa.report.page import plain, question_list

SAMPLES = 20


@dataclass(frozen=True)
class EvaluationView:
    """Arrays are `[questions]` in the order of the store.

    confidence: the probability of the answer given, in its n-best list. null_odds: None for v1.1 data. samples: the
    same questions every time, spread over the file, with their answers.
    """

    scores: QuestionScores
    confidence: np.ndarray
    null_odds: np.ndarray | None
    samples: list[tuple[Example, str, float]]

    def listing(self) -> str:
        """The samples as a Markdown list."""

        def items() -> Iterator[tuple[str, str, dict[str, str]]]:
            for example, answer, f1 in self.samples:
                mark = "right" if f1 == 1 else "wrong" if f1 == 0 else f"partly right (F1 {f1:.2f})"
                golds = " / ".join(dict.fromkeys(plain(text) for text in gold_texts(example)))
                yield mark, example.question, {"answer": plain(answer), "gold": golds or plain("")}

        return question_list(items())


def view_evaluation(folder: Path, store: FeatureStore, version_2_with_negative: bool, language: str) -> EvaluationView:
    """Read the files that an evaluation on the store's questions wrote into `folder`."""
    predictions = json.loads((folder / PREDICTIONS_FILE).read_text(encoding="utf-8"))
    scores = score_questions(store, predictions, version_2_with_negative, language)
    confidence = {
        example_id: next((entry["probability"] for entry in nbest if entry["text"] == predictions[example_id]), 0.0)
        for example_id, nbest in _lines(folder / NBEST_FILE)
    }
    ids = store.examples.ids
    null_odds = None
    if version_2_with_negative:
        odds = json.loads((folder / NULL_ODDS_FILE).read_text(encoding="utf-8"))
        null_odds = np.array([odds[example_id] for example_id in ids])
    chosen = np.unique(np.linspace(0, len(ids) - 1, min(SAMPLES, len(ids))).astype(int))
    samples = [(store.examples[int(i)], predictions[ids[i]], float(scores.f1[i])) for i in chosen]
    return EvaluationView(scores, np.array([confidence[example_id] for example_id in ids]), null_odds, samples)


def _lines(path: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(question id, n-best list) of a file that has a question a line, one at a time."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            text = line.strip().rstrip(",")
            if text.startswith('"'):
                ((example_id, nbest),) = json.loads(f"{{{text}}}").items()
                yield example_id, nbest
