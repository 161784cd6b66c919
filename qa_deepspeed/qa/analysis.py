"""What an evaluation says beyond its scores: calibration, thresholds, scores by kind of question, worst mistakes."""

from __future__ import annotations

import heapq
import re
from array import array
from collections import defaultdict
from typing import Any

import numpy as np

from qa_deepspeed.qa.examples import Example
from qa_deepspeed.qa.metrics import score_answer
from qa_deepspeed.qa.normalization import normalized_tokens
from qa_deepspeed.qa.predictions import Prediction

CALIBRATION_BINS = 10
CURVE_POINTS = 200
MISTAKES_KEPT = 50
SNIPPET_CHARACTERS = 80  # of context on either side of the predicted answer
QUESTION_WORDS = ("what", "which", "who", "whom", "whose", "where", "when", "why", "how many", "how much", "how")


class Analysis:
    """Takes questions one at a time and keeps a few numbers of each; `report` sums up."""

    def __init__(self, version_2_with_negative: bool, language: str = "en"):
        self._v2 = version_2_with_negative
        self._language = language
        self._confidence, self._f1 = array("d"), array("d")
        self._exact, self._has_answer = array("b"), array("b")
        self._odds, self._best_exact, self._best_f1 = array("d"), array("b"), array("d")
        # slice -> value -> [questions, exact, f1]
        self._slices: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0, 0.0, 0.0]))
        self._mistakes: list[tuple[float, int, dict[str, Any]]] = []

    def add(self, example: Example, prediction: Prediction, windows: int) -> None:
        """Take in one question; `windows` is the number of its features."""
        golds = tuple(answer.text for answer in example.answers)
        exact, f1 = score_answer(prediction.text, golds, self._v2, self._language)
        confidence = next((e["probability"] for e in prediction.nbest if e["text"] == prediction.text), 0.0)
        self._exact.append(exact)
        self._f1.append(f1)
        self._confidence.append(confidence)
        if prediction.null_odds is not None:
            best = prediction.best_span_text
            best_exact, best_f1 = score_answer(best, golds, self._v2, self._language) if best else (0, 0.0)
            self._odds.append(prediction.null_odds)
            self._has_answer.append(bool(golds))
            self._best_exact.append(best_exact)
            self._best_f1.append(best_f1)
        for name, value in self._kinds(example, golds, windows).items():
            cell = self._slices[name][value]
            cell[0] += 1
            cell[1] += exact
            cell[2] += f1
        if not exact:
            self._remember_mistake(example, prediction, golds, confidence, f1)

    def _kinds(self, example: Example, golds: tuple[str, ...], windows: int) -> dict[str, str]:
        kinds = {
            "question_word": question_word(example.question),
            "context_words": _bucket(len(example.context.split()), (50, 100, 150, 200, 300)),
            "windows": _bucket(windows, (0, 1, 2, 3)),
        }
        if golds:
            words = min(len(normalized_tokens(gold, self._language)) for gold in golds)
            kinds["answer_words"] = _bucket(words, (1, 2, 3, 5, 10))
        if self._v2:
            kinds["answerable"] = "yes" if golds else "no"
        return kinds

    def _remember_mistake(
        self, example: Example, prediction: Prediction, golds: tuple[str, ...], confidence: float, f1: float
    ) -> None:
        # the running number settles ties, so that the mistake seen first stays
        key = (confidence, -len(self._exact))
        if len(self._mistakes) == MISTAKES_KEPT and key < self._mistakes[0][:2]:
            return
        mistake = {
            "example_id": example.example_id,
            "question": example.question,
            "gold": list(dict.fromkeys(golds)),
            "prediction": prediction.text,
            "probability": confidence,
            "f1": f1,
            "context": _snippet(example, prediction, golds),
        }
        push = heapq.heappushpop if len(self._mistakes) == MISTAKES_KEPT else heapq.heappush
        push(self._mistakes, (*key, mistake))  # type: ignore[arg-type]

    def report(self) -> dict[str, Any]:
        """JSON-able: `calibration`, `slices`, `mistakes` and, with null odds, `precision_recall`."""
        mistakes = [mistake for *_, mistake in sorted(self._mistakes, key=lambda m: m[:2], reverse=True)]
        report = {
            "questions": len(self._exact),
            "calibration": calibration(np.array(self._confidence), np.array(self._exact)),
            "slices": {name: _shares(values) for name, values in self._slices.items()},
            "mistakes": mistakes,
        }
        if self._odds:
            has_answer, odds = np.array(self._has_answer, bool), np.array(self._odds)
            report["precision_recall"] = {
                "exact": precision_recall(np.array(self._best_exact, float), has_answer, odds),
                "f1": precision_recall(np.array(self._best_f1), has_answer, odds),
                "oracle": precision_recall(np.ones(len(odds)), has_answer, odds),
            }
        return report


def question_word(question: str) -> str:
    """The first question word of a question, "other" if there is none."""
    found = re.search(rf"\b({'|'.join(QUESTION_WORDS)})\b", question.lower())
    return found.group(1) if found else "other"


def calibration(confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Expected calibration error: the mean gap between confidence and accuracy over bins of equal width, weighted by
    their sizes (Guo et al. 2017, equation 5).

    Args:
        confidence: float [questions] in 0..1. correct: 0 or 1 [questions].
    """
    number = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    bins, error = [], 0.0
    for i in range(CALIBRATION_BINS):
        inside = number == i
        count = int(inside.sum())
        if count:
            mean, accuracy = float(confidence[inside].mean()), float(correct[inside].mean())
            error += abs(mean - accuracy) * count / len(confidence)
            edges = {"from": i / CALIBRATION_BINS, "to": (i + 1) / CALIBRATION_BINS}
            bins.append(edges | {"questions": count, "confidence": mean, "accuracy": accuracy})
    return {"expected_calibration_error": error, "bins": bins}


def precision_recall(score: np.ndarray, has_answer: np.ndarray, odds: np.ndarray) -> dict[str, Any]:
    """Precision and recall of the answers given while the threshold on the null odds rises, and average precision in
    percent, as the official v2.0 script has them (`make_precision_recall_eval`); at most CURVE_POINTS points are kept.

    Args:
        score: float [questions], what the best span earns. has_answer: bool. odds: float, the null odds.
    """
    if not has_answer.any():
        return {"average_precision": 0.0, "threshold": [], "precision": [], "recall": []}
    order = np.argsort(odds, kind="stable")
    odds = odds[order]
    earned = np.cumsum(np.where(has_answer, score, 0.0)[order])
    last_of_equals = np.append(odds[1:] != odds[:-1], True)
    precision = (earned / np.arange(1, len(odds) + 1))[last_of_equals]
    recall = (earned / has_answer.sum())[last_of_equals]
    average = float((precision * np.diff(recall, prepend=0.0)).sum())
    shown = np.unique(np.linspace(0, len(precision) - 1, CURVE_POINTS).round().astype(int))
    return {
        "average_precision": 100.0 * average,
        "threshold": odds[last_of_equals][shown].tolist(),
        "precision": precision[shown].tolist(),
        "recall": recall[shown].tolist(),
    }


def _bucket(value: int, ends: tuple[int, ...]) -> str:
    """The range that holds the value; `ends` are the last values of all ranges but the open one."""
    begin = 0
    for end in ends:
        if value <= end:
            return str(end) if begin == end else f"{begin}-{end}"
        begin = end + 1
    return f"{begin}+"


def _shares(values: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    def first_number(name: str) -> tuple[int, str]:
        digits = re.match(r"\d+", name)
        return (int(digits.group()) if digits else 0, name)

    return {
        value: {"questions": int(count), "exact": 100.0 * exact / count, "f1": 100.0 * f1 / count}
        for value, (count, exact, f1) in sorted(values.items(), key=lambda item: first_number(item[0]))
    }


def _snippet(example: Example, prediction: Prediction, golds: tuple[str, ...]) -> str:
    """The context around the predicted answer, or around the first located gold answer if none was given."""
    begin = next((e["start"] for e in prediction.nbest if e["text"] == prediction.text and e["text"]), -1)
    length = len(prediction.text)
    if begin < 0 and golds:
        begin, length = max(example.context.find(golds[0]), 0), len(golds[0])
    begin = max(begin, 0)
    first, last = max(0, begin - SNIPPET_CHARACTERS), min(len(example.context), begin + length + SNIPPET_CHARACTERS)
    head, tail = "…" if first else "", "…" if last < len(example.context) else ""
    return head + example.context[first:last] + tail
