"""Decoding by the rules of the question-answering pipeline of Transformers 4.

Rules: `QuestionAnsweringPipeline.postprocess`, `select_starts_ends` and `decode_spans` in
src/transformers/pipelines/question_answering.py of https://github.com/huggingface/transformers, release 4.57.6. A
span's score is the product of its start's and its end's probability in softmaxes over the window's context tokens and
the null position. Spans are widened to whole words; spans of a question whose texts differ only in case are one answer
with the sum of their scores and the position of the first. The null answer's score is its smallest over the windows.

Deliberate differences: blanks at the edges of an answer are trimmed, and a span of only blanks is no answer; a question
about a context without tokens is answered with "" where the original returns an empty list; the null answer uses the
model's own null position where the original uses the first token; and a threshold on the null odds, if there is one,
decides between the null answer and the best span regardless of their scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qa_deepspeed.qa.decoding.exact import Candidates
from qa_deepspeed.qa.features.in_memory import AnswerStore

Answer = dict[str, Any]
"""score, start, end, answer: keys and order of the pipeline's results."""


@dataclass(frozen=True)
class PipelineSettings:
    """How candidates become answers: the pipeline's arguments, and an optional threshold on the null odds."""

    top_k: int = 1
    max_answer_len: int = 15  # tokens
    handle_impossible_answer: bool = False
    align_to_words: bool = True
    null_score_diff_threshold: float | None = None
    null_score_is_odds: bool = False  # null scores are already null odds (beam heads)

    @property
    def spans_of_a_window(self) -> int:
        """Spans considered per window: more than requested, since some become equal when widened to words."""
        return self.top_k * 2 + 10 if self.align_to_words else self.top_k


def decode_like_pipeline(
    candidates: Candidates, normalizer: np.ndarray, store: AnswerStore, settings: PipelineSettings
) -> Iterator[list[Answer]]:
    """Yield the answers to every example of the store, best first, at most `top_k` of them and at least one.

    Args:
        candidates: at least `settings.spans_of_a_window` of each feature that has so many.
        normalizer: float32 `[features]`, as `candidates.normalizers`.
    """
    score = (candidates.start_logit + candidates.end_logit)[:, : settings.spans_of_a_window]
    row, column = np.nonzero(candidates.start[:, : settings.spans_of_a_window] >= 0)
    spans_of = store.word_spans if settings.align_to_words else store.character_spans
    begin, end = spans_of(candidates.feature_id[row], candidates.start[row, column], candidates.end[row, column])
    probability = np.exp(score[row, column] - normalizer[row])
    null_score = candidates.null_scores().astype(np.float64)
    null_probability = 1 / (1 + np.exp(-null_score)) if settings.null_score_is_odds else np.exp(null_score - normalizer)
    question = store.example_index
    first_row = np.searchsorted(question, np.arange(len(store.examples) + 1))
    first_span = np.searchsorted(row, first_row)
    _, contexts = store.examples.ids_and_contexts(0, len(store.examples))
    for index, context in enumerate(contexts):
        rows = slice(first_row[index], first_row[index + 1])
        spans = slice(first_span[index], first_span[index + 1])
        found = _merged(context, probability[spans].tolist(), begin[spans].tolist(), end[spans].tolist())
        if not found:
            yield [_null_answer(float(null_probability[rows].min(initial=1.0)))]
            continue
        found.sort(key=lambda answer: -answer["score"])
        if settings.handle_impossible_answer:
            best = 0.0 if settings.null_score_is_odds else float(score[row[spans], column[spans]].max())
            odds = float(null_score[rows].min()) - best
            null = _null_answer(float(null_probability[rows].min()))
            _insert_null(found, null, odds, settings.null_score_diff_threshold)
        yield found[: settings.top_k]


def _merged(context: str, probabilities: list[float], begins: list[int], ends: list[int]) -> list[Answer]:
    answers: dict[str, Answer] = {}
    for probability, begin, end in zip(probabilities, begins, ends, strict=True):
        text = context[begin:end]
        answer = text.strip()
        if not answer:
            continue
        known = answers.get(answer.lower())
        if known is not None:
            known["score"] += probability
            continue
        start = begin + len(text) - len(text.lstrip())
        answers[answer.lower()] = {"score": probability, "start": start, "end": start + len(answer), "answer": answer}
    return list(answers.values())


def _insert_null(found: list[Answer], null: Answer, odds: float, threshold: float | None) -> None:
    """Insert the null answer by its score; a threshold decides whether it comes before or after the best span."""
    place = sum(answer["score"] >= null["score"] for answer in found)
    if threshold is not None:
        place = 0 if odds > threshold else max(place, 1)
    found.insert(place, null)


def _null_answer(score: float) -> Answer:
    return {"score": score, "start": 0, "end": 0, "answer": ""}
