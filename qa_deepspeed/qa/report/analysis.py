"""Analysis of an evaluation beyond its scores: calibration, precision and recall, scores by slice, worst mistakes."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.decoding.predictions import Prediction
from qa_deepspeed.qa.metrics.normalization import normalized_tokens
from qa_deepspeed.qa.metrics.prediction_files import GoldFile
from qa_deepspeed.qa.metrics.records import QuestionRecords
from qa_deepspeed.qa.metrics.significance import intervals_of_sums
from qa_deepspeed.qa.metrics.squad import Gold
from qa_deepspeed.qa.metrics.thresholds import QUESTIONS_AT_ONCE, by_odds
from qa_deepspeed.qa.report.questions import NBEST_SHOWN, GivenAnswer

CALIBRATION_BINS = 10
CURVE_POINTS = 200
MAX_MISTAKES = 50
MAX_CLUSTERS = 4000  # of the bootstrap, whose memory grows with their number
MIN_PARAGRAPHS = 10  # of a slice with an interval: a bootstrap over fewer is too narrow
MAX_FILES = 50  # of an evaluation whose files are a slice: intervals of many take memory
SNIPPET_CHARACTERS = 80  # of context on either side of the predicted answer
QUESTION_WORDS = ("what", "which", "who", "whom", "whose", "where", "when", "why", "how many", "how much", "how")


SLICES = ("file", "question_word", "context_words", "windows", "answer_words", "answerable")
NO_CELL = 255  # of a question without a value of this slice

_Intervals = dict[str, list[float]]
"""Low and high end of exact and f1 in percent."""


@dataclass(slots=True)
class _Cell:
    """The questions with one value of one slice; `number` counts the cells of all slices."""

    number: int
    questions: int = 0
    exact: float = 0.0
    f1: float = 0.0


class Analysis:
    """Analyses scored questions one at a time, recording a few numbers of each; `report` summarises them."""

    def __init__(self, version_2_with_negative: bool, language: str = "en", folder: Path | None = None):
        """folder: where the records of many questions are spilled."""
        self._v2 = version_2_with_negative
        self._language = language
        fields = [("confidence", "f4"), ("paragraph", "i4"), ("cells", "u1", (len(SLICES),))]
        self._records = QuestionRecords(np.dtype(fields), folder)
        self._paragraphs = 0
        self._context: str | None = None
        self._cells: dict[tuple[str, str], _Cell] = {}  # by slice and value
        self._mistakes: list[tuple[float, int, dict[str, Any]]] = []

    def add(
        self, example: Example, prediction: Prediction, windows: int, exact: int, f1: float, file: str = ""
    ) -> tuple[GivenAnswer, dict[str, str]]:
        """Add one question with its scores.

        Args:
            windows: the number of its features. file: the value of its slice "file", "" for none.
        Returns:
            The answer with its place and confidence, and the question's value of each slice that it is in.
        """
        golds = tuple(answer.text for answer in example.answers)
        answer = given_answer(prediction, f1)
        confidence = answer.confidence or 0.0
        if example.context != self._context:  # the questions of a paragraph are adjacent
            self._paragraphs += 1
            self._context = example.context
        cells = [NO_CELL] * len(SLICES)
        values = (file or None, *self._slices_of(example, golds, windows))
        for place, value in enumerate(values):
            if value is not None:
                cell = self._cell(SLICES[place], value)
                cell.questions += 1
                cell.exact += exact
                cell.f1 += f1
                cells[place] = cell.number
        self._records.append((confidence, self._paragraphs - 1, cells))
        if not exact:
            self._remember_mistake(example, answer, golds, confidence)
        return answer, {name: value for name, value in zip(SLICES, values, strict=True) if value is not None}

    def _cell(self, name: str, value: str) -> _Cell:
        cell = self._cells.get((name, value))
        if cell is None:
            assert len(self._cells) < NO_CELL, "a cell's number is a byte"
            cell = self._cells[name, value] = _Cell(len(self._cells))
        return cell

    def _slices_of(self, example: Example, golds: tuple[str, ...], windows: int) -> tuple[str | None, ...]:
        """The question's value of each of SLICES but the first, None where it has none."""
        words = min((len(normalized_tokens(gold, self._language)) for gold in golds), default=None)
        return (
            question_word(example.question),
            _bucket(len(example.context.split()), (50, 100, 150, 200, 300)),
            _bucket(windows, (0, 1, 2, 3)),
            None if words is None else _bucket(words, (1, 2, 3, 5, 10)),
            ("yes" if golds else "no") if self._v2 else None,
        )

    def _remember_mistake(
        self, example: Example, answer: GivenAnswer, golds: tuple[str, ...], confidence: float
    ) -> None:
        # the question's number breaks ties, in favour of the earlier mistake
        key = (confidence, -len(self._records))
        if len(self._mistakes) == MAX_MISTAKES and key < self._mistakes[0][:2]:
            return
        mistake = {
            "example_id": example.example_id,
            "question": example.question,
            "gold": list(dict.fromkeys(golds)),
            "prediction": answer.text,
            "probability": confidence,
            "f1": answer.f1,
            "context": _snippet(example, answer, golds),
        }
        if len(self._mistakes) == MAX_MISTAKES:
            heapq.heappushpop(self._mistakes, (*key, mistake))
        else:
            heapq.heappush(self._mistakes, (*key, mistake))

    def confidence(self) -> np.ndarray:
        """The probability of each answer given, float32 `[questions]`, perhaps mapped."""
        return self._records.columns()["confidence"]

    def report(self, scores: np.ndarray) -> dict[str, Any]:
        """JSON-able: `questions`, `intervals`, `calibration`, `slices`, `mistakes` and, with null odds,
        `precision_recall`.

        `slices` has questions, exact and f1 by slice and value, with `intervals` where they are of at least
        MIN_PARAGRAPHS paragraphs. Intervals are 95% bootstrap intervals in percent over paragraphs.

        Args:
            scores: `Scorer.records` of the same questions.
        """
        records = self._records.columns()
        assert len(records) == len(scores), "scorer and analysis have the same questions"
        mistakes = [mistake for *_, mistake in sorted(self._mistakes, key=lambda m: m[:2], reverse=True)]
        of_all, of_cells = self._intervals(scores, records)
        report = {
            "questions": len(records),
            "intervals": of_all,
            "calibration": calibration(records["confidence"], scores["exact"]),
            "slices": self._slices(of_cells),
            "mistakes": mistakes,
        }
        if self._v2:
            has_answer, odds = scores["has_answer"], scores["odds"]
            gains = {"exact": scores["best_exact"], "f1": scores["best_f1"], "oracle": None}
            order = by_odds(odds)
            report["precision_recall"] = {
                name: precision_recall(column, has_answer, odds, order) for name, column in gains.items()
            }
        return report

    def _intervals(self, scores: np.ndarray, records: np.ndarray) -> tuple[_Intervals, list[_Intervals]]:
        """Intervals of all questions, and of the questions of each cell (empty for few paragraphs) by its number.

        Paragraphs are grouped with their neighbours if there are many.
        """
        clusters, sets = min(self._paragraphs, MAX_CLUSTERS), len(self._cells) + 1  # the last set: all questions
        counts, exact, f1 = (np.zeros(clusters * sets) for _ in range(3))
        for begin in range(0, len(scores), QUESTIONS_AT_ONCE):
            part = slice(begin, begin + QUESTIONS_AT_ONCE)
            cluster = records["paragraph"][part].astype(np.int64) * clusters // self._paragraphs
            of_question = np.column_stack((records["cells"][part], np.full(len(cluster), sets - 1)))
            question, place = np.nonzero(of_question != NO_CELL)
            number = cluster[question] * sets + of_question[question, place]
            counts += np.bincount(number, minlength=clusters * sets)
            for sums, name in ((exact, "exact"), (f1, "f1")):
                sums += np.bincount(number, weights=scores[name][part][question], minlength=clusters * sets)
        questions = counts.reshape(clusters, sets)
        ends = 100 * intervals_of_sums(np.stack((exact, f1)).reshape(2, clusters, sets), questions)
        named = [dict(zip(("exact", "f1"), ends[:, number].tolist(), strict=True)) for number in range(sets)]
        paragraphs = np.count_nonzero(questions, axis=0)
        of_cells = [named[number] if paragraphs[number] >= MIN_PARAGRAPHS else {} for number in range(sets - 1)]
        return named[-1], of_cells

    def _slices(self, intervals: list[_Intervals]) -> dict[str, dict[str, dict[str, Any]]]:
        """Questions, scores in percent and intervals by slice and value, values in their natural order."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for (name, value), cell in sorted(self._cells.items(), key=lambda item: _natural_order(*item[0])):
            scores = {"exact": 100.0 * cell.exact / cell.questions, "f1": 100.0 * cell.f1 / cell.questions}
            with_intervals = {"intervals": intervals[cell.number]} if intervals[cell.number] else {}
            found.setdefault(name, {})[value] = {"questions": cell.questions, **scores, **with_intervals}
        return found


def given_answer(prediction: Prediction, f1: float) -> GivenAnswer:
    """The answer of a prediction, with the place and probability of the best n-best entry that has its text."""
    texts, probabilities, _, _, starts = prediction.nbest_columns
    try:
        place = texts.index(prediction.text)
        start, confidence = int(starts[place]), float(probabilities[place])
    except ValueError:
        start, confidence = -1, 0.0
    best = zip(texts[:NBEST_SHOWN], starts[:NBEST_SHOWN].tolist(), probabilities[:NBEST_SHOWN].tolist(), strict=True)
    return GivenAnswer(prediction.text, start, f1, confidence, tuple(best))


def slices_of(gold: GoldFile, question: Gold) -> dict[str, str]:
    """The slices of a question that a gold file alone shows, without windows or tokens."""
    slices = {"question_word": question_word(gold.wording[question.example_id])}
    return slices | ({"answerable": "yes" if question.texts else "no"} if gold.version_2 else {})


def question_word(question: str) -> str:
    """The first question word of a question, "other" if there is none."""
    found = re.search(rf"\b({'|'.join(QUESTION_WORDS)})\b", question.lower())
    return found.group(1) if found else "other"


def calibration(confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Expected calibration error: the mean gap between confidence and accuracy over bins of equal width, weighted by
    bin size (Guo et al. 2017, equation 5).

    Args:
        confidence: float [questions] in 0..1. correct: 0 or 1 [questions].
    """
    counts, confident, right = np.zeros((3, CALIBRATION_BINS))
    for begin in range(0, len(confidence), QUESTIONS_AT_ONCE):
        part = np.asarray(confidence[begin : begin + QUESTIONS_AT_ONCE], np.float64)
        number = np.clip(np.ceil(part * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
        counts += np.bincount(number, minlength=CALIBRATION_BINS)
        confident += np.bincount(number, part, CALIBRATION_BINS)
        right += np.bincount(number, correct[begin : begin + QUESTIONS_AT_ONCE], CALIBRATION_BINS)
    bins, error = [], 0.0
    for i in np.flatnonzero(counts).tolist():
        mean, accuracy = float(confident[i] / counts[i]), float(right[i] / counts[i])
        error += abs(mean - accuracy) * float(counts[i]) / len(confidence)
        edges = {"from": i / CALIBRATION_BINS, "to": (i + 1) / CALIBRATION_BINS}
        bins.append(edges | {"questions": int(counts[i]), "confidence": mean, "accuracy": accuracy})
    return {"expected_calibration_error": error, "bins": bins}


def precision_recall(
    score: np.ndarray | None, has_answer: np.ndarray, odds: np.ndarray, order: np.ndarray
) -> dict[str, Any]:
    """Precision and recall of the answers given at ascending thresholds on the null odds, and average precision in
    percent, as in the official v2.0 script (`make_precision_recall_eval`); the curve has at most CURVE_POINTS points.

    Args:
        score: float [questions], the score of the best span; None for 1 everywhere. has_answer: bool. odds: float, the
            null odds. order: int [questions], by ascending odds.
    """
    curve: dict[str, Any] = {"average_precision": 0.0, "threshold": [], "precision": [], "recall": []}
    answerable = int(has_answer.sum())
    if not answerable:
        return curve
    distinct = sum(int(ends.sum()) for _, ends in _odds_in_order(odds, order))
    shown = np.unique(np.linspace(0, distinct - 1, CURVE_POINTS).round().astype(int))
    earned = recall_before = average = 0.0
    done = passed = 0
    for questions, ends in _odds_in_order(odds, order):
        gains = has_answer[questions] * (1.0 if score is None else score[questions])
        totals = np.cumsum(np.concatenate(([earned], gains)))[1:]
        precision = (totals / np.arange(done + 1, done + len(questions) + 1))[ends]
        recall = (totals / answerable)[ends]
        average += float((precision * np.diff(recall, prepend=recall_before)).sum())
        here = shown[(shown >= passed) & (shown < passed + len(recall))] - passed
        for name, values in (("threshold", odds[questions[ends]]), ("precision", precision), ("recall", recall)):
            curve[name] += values[here].tolist()
        earned, done, passed = float(totals[-1]), done + len(questions), passed + len(recall)
        recall_before = float(recall[-1]) if len(recall) else recall_before
    return curve | {"average_precision": 100.0 * average}


def _odds_in_order(odds: np.ndarray, order: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Questions by ascending odds in chunks, with a flag for the last question of each odds value."""
    for begin in range(0, len(order), QUESTIONS_AT_ONCE):
        questions = order[begin : begin + QUESTIONS_AT_ONCE]
        following = odds[order[begin + len(questions)]] if begin + len(questions) < len(order) else np.nan
        values = odds[questions]
        yield questions, np.append(values[1:], following) != values


def _bucket(value: int, ends: tuple[int, ...]) -> str:
    """The range that contains the value; `ends` are the last values of all ranges except the open one."""
    begin = 0
    for end in ends:
        if value <= end:
            return str(end) if begin == end else f"{begin}-{end}"
        begin = end + 1
    return f"{begin}+"


def _natural_order(name: str, value: str) -> tuple[int, int, str]:
    digits = re.match(r"\d+", value) if name != "file" else None
    return SLICES.index(name), int(digits.group()) if digits else 0, value


def _snippet(example: Example, answer: GivenAnswer, golds: tuple[str, ...]) -> str:
    """The context around the predicted answer, or around the first gold answer if the prediction is empty."""
    begin = answer.start if answer.text else -1
    length = len(answer.text)
    if begin < 0 and golds:
        begin, length = max(example.context.find(golds[0]), 0), len(golds[0])
    begin = max(begin, 0)
    first, last = max(0, begin - SNIPPET_CHARACTERS), min(len(example.context), begin + length + SNIPPET_CHARACTERS)
    head, tail = "…" if first else "", "…" if last < len(example.context) else ""
    return head + example.context[first:last] + tail
