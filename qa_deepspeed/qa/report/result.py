"""The result of scoring an evaluation: metrics, report, samples and a few numbers of each question."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.decoding.predictions import Prediction
from qa_deepspeed.qa.metrics.by_file import scores_by_file
from qa_deepspeed.qa.metrics.squad import Gold, Scorer
from qa_deepspeed.qa.report.analysis import MAX_FILES, Analysis
from qa_deepspeed.qa.report.errors import CLASSES, RIGHT, ErrorCounts, error_class, gold_doubt
from qa_deepspeed.qa.report.questions import QuestionRecord, QuestionTable
from qa_deepspeed.qa.report.samples import Sample, sample_numbers


@dataclass(frozen=True)
class EvaluationResult:
    """The result of one pass over the predictions. Arrays are `[questions]`, memory-mapped if there are many.

    report: the content of report.json, with `metrics` and `intervals`. correct: the answer given is an exact match.
    has_answer: the question has a gold answer. confidence: the probability of the answer given, in its n-best list.
    null_odds: None for v1.1 data. questions: what report.html lists.
    """

    report: dict[str, Any]
    correct: np.ndarray
    has_answer: np.ndarray
    confidence: np.ndarray
    null_odds: np.ndarray | None
    samples: list[Sample]
    questions: QuestionTable

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics by name."""
        metrics: dict[str, Any] = self.report["metrics"]
        return metrics


class ResultBuilder:
    """Scores and analyses questions one at a time, recording a few bytes of each, and builds the result at the end."""

    def __init__(
        self,
        version_2_with_negative: bool,
        language: str,
        questions: int,
        folder: Path | None = None,
        files: Sequence[str] = (),
        file_of_question: np.ndarray | None = None,
    ):
        """questions: their number. folder: where the records of many questions are spilled. files and file_of_question
        (`[questions]`): names of several files, and the number of each question's.
        """
        self._v2 = version_2_with_negative
        self._scorer = Scorer(version_2_with_negative, language, folder)
        self._analysis = Analysis(version_2_with_negative, language, folder)
        self._sampled = sample_numbers(questions)
        self._samples: list[Sample] = []
        self._errors = ErrorCounts()
        self._table = QuestionTable(CLASSES)
        self._scored = self._not_scored = 0
        self._files, self._file_of_question = files, file_of_question
        self._file_of_scored = array("i")

    def observe(
        self, examples: Iterable[Example], predictions: Iterable[Prediction], windows: Iterable[int]
    ) -> Iterator[Prediction]:
        """Pass the predictions through, adding each with its example and its number of windows.

        Questions whose gold answers are not known are counted only.
        """
        triples = zip(examples, predictions, windows, strict=True)
        for number, (example, prediction, window_count) in enumerate(triples):
            scores = score_prediction(self._scorer, example, prediction)
            if scores is None:
                self._not_scored += 1
            else:
                self._scored += 1
                file = ""
                if self._file_of_question is not None:
                    number_of_file = int(self._file_of_question[number])
                    self._file_of_scored.append(number_of_file)
                    file = self._files[number_of_file]
                self._analyse(example, prediction, window_count, *scores, file)
                if number in self._sampled:
                    golds = tuple(answer.text for answer in example.answers)
                    self._samples.append(Sample(example.question, golds, prediction.text, scores[1]))
            yield prediction

    def _analyse(
        self, example: Example, prediction: Prediction, windows: int, exact: int, f1: float, file: str
    ) -> None:
        compared = file if len(self._files) <= MAX_FILES else ""
        answer, slices = self._analysis.add(example, prediction, windows, exact, f1, compared)
        error = error_class(example, answer.text, answer.start, exact, f1)
        self._errors.add(error, f1)
        self._table.add(
            QuestionRecord(
                example_id=example.example_id,
                question=example.question,
                context=example.context,
                golds=example.answers,
                answers=[answer],
                outcome=error,
                wrong=error != RIGHT,
                slices={name: value for name, value in slices.items() if name != "file"},
                note="" if error == RIGHT else gold_doubt(example),
                file=file,
            )
        )

    def metrics(self) -> dict[str, Any]:
        """The metrics of the questions so far (`Scorer.result`), of several files also by file (`scores_by_file`), and
        the number of those `not_scored`, if any."""
        scores = self._scorer.result() if self._scored else {"total": 0}
        if self._files:
            scores |= scores_by_file(self._scorer, self._files, np.asarray(self._file_of_scored))
        return scores | ({"not_scored": self._not_scored} if self._not_scored else {})

    def result(self, metrics: dict[str, Any]) -> EvaluationResult | None:
        """The result, with these metrics in its report; None where no question was scored."""
        if not self._scored:
            return None
        records = self._scorer.records()
        return EvaluationResult(
            report={"metrics": metrics, "errors": self._errors.report(), **self._analysis.report(records)},
            correct=records["exact"] > 0,
            has_answer=records["has_answer"],
            confidence=self._analysis.confidence(),
            null_odds=records["odds"] if self._v2 else None,
            samples=self._samples,
            questions=self._table,
        )


def score_prediction(scorer: Scorer, example: Example, prediction: Prediction) -> tuple[int, float] | None:
    """Exact match and F1 of one prediction, added to the scorer; None where the gold answers are not known."""
    assert prediction.example_id == example.example_id, "predictions and examples are in different orders"
    if not example.has_gold:
        return None
    gold = Gold(example.example_id, tuple(answer.text for answer in example.answers))
    return scorer.add(gold, prediction.text, prediction.null_odds, prediction.best_span_text)
