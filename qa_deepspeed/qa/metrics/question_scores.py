"""Each question's own scores: for intervals, histograms and samples, where the metrics are only means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.qa.metrics.significance import Interval, confidence_interval
from qa_deepspeed.qa.metrics.squad import score_answer


class QuestionScores(NamedTuple):
    """Scores 0 to 1 `[questions]` in the order of the store, whether a question has an answer, and its paragraph."""

    exact: np.ndarray
    f1: np.ndarray
    has_answer: np.ndarray
    paragraph: np.ndarray

    def intervals(self) -> dict[str, Interval]:
        """95% bootstrap intervals of exact and f1 in percent, paragraphs being drawn."""
        found = {}
        for name, values in (("exact", self.exact), ("f1", self.f1)):
            low, high = confidence_interval(values, self.paragraph)
            found[name] = Interval(100 * low, 100 * high)
        return found


def score_questions(
    store: FeatureStore, predictions: Mapping[str, str], version_2_with_negative: bool, language: str
) -> QuestionScores:
    """Score every question of the store by its prediction, by the rules of the metrics."""
    count = len(store.examples)
    scores, has_answer = np.zeros((count, 2)), np.zeros(count, bool)
    paragraph = np.zeros(count, np.int64)
    numbers: dict[str, int] = {}
    for index, example in enumerate(store.examples):
        texts = gold_texts(example)
        scores[index] = score_answer(predictions[example.example_id], texts, version_2_with_negative, language)
        has_answer[index] = bool(texts)
        paragraph[index] = numbers.setdefault(example.context, len(numbers))
    return QuestionScores(scores[:, 0], scores[:, 1], has_answer, paragraph)


def gold_texts(example: Example) -> tuple[str, ...]:
    """The texts of the gold answers."""
    return tuple(answer.text for answer in example.answers)
