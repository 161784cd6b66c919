"""Sample predictions: the same questions of a file in every evaluation, with their answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from qa_deepspeed.qa.report.page import plain, question_list

SAMPLES = 20


@dataclass(frozen=True)
class Sample:
    """One question with its gold answers, the answer given and its F1 in 0..1."""

    question: str
    golds: tuple[str, ...]
    answer: str
    f1: float


def sample_numbers(questions: int) -> frozenset[int]:
    """The numbers of at most SAMPLES of that many questions, spread evenly over the file."""
    if not questions:
        return frozenset()
    return frozenset(np.linspace(0, questions - 1, min(SAMPLES, questions)).astype(int).tolist())


def sample_list(samples: Iterable[Sample]) -> str:
    """The samples as a Markdown list."""

    def items() -> Iterator[tuple[str, str, dict[str, str]]]:
        for sample in samples:
            mark = "right" if sample.f1 == 1 else "wrong" if sample.f1 == 0 else f"partly right (F1 {sample.f1:.2f})"
            golds = " / ".join(dict.fromkeys(plain(text) for text in sample.golds))
            yield mark, sample.question, {"answer": plain(sample.answer), "gold": golds or plain("")}

    return question_list(items())
