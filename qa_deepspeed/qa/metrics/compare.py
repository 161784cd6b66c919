"""Compare two prediction files question by question: where they differ, and the effect on the scores."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qa_deepspeed.qa.metrics.prediction_files import GoldFile
from qa_deepspeed.qa.metrics.significance import paired_difference
from qa_deepspeed.qa.metrics.squad import score_answer
from qa_deepspeed.utils.errors import UserError


@dataclass(frozen=True)
class Difference:
    """One question that A and B answer differently; None if a file does not answer it. Scores are in 0..1."""

    example_id: str
    question: str
    gold: tuple[str, ...]
    a: str | None
    b: str | None
    exact_a: int
    exact_b: int
    f1_a: float
    f1_b: float


def explain(gold: GoldFile, a: dict[str, str], b: dict[str, str], language: str) -> dict[str, Any]:
    """Compare two systems question by question.

    A question without an answer counts as wrong for that system.

    Returns:
        exact and f1 of A and B, and for both metrics B minus A in points with its 95% interval and p value
        (`significance.paired_difference`); `differences`: `Difference` dicts, the largest change in F1 first; counts of
        differences that improve B, worsen B, or change no score.

    Raises:
        UserError: one of the prediction files has no question in common with the gold file.
    """
    questions = list({question.example_id: question for question in gold.questions}.values())
    if not any(q.example_id in a for q in questions) or not any(q.example_id in b for q in questions):
        raise UserError(
            "one of the prediction files answers no question of the gold file: is it from another data set?"
        )
    scores = np.zeros((4, len(questions)))  # exact A, exact B, f1 A, f1 B
    differences = []
    for i, question in enumerate(questions):
        text_a, text_b = a.get(question.example_id), b.get(question.example_id)
        exact_a, f1_a = score_or_nothing(text_a, question.texts, gold.version_2, language)
        exact_b, f1_b = (
            (exact_a, f1_a) if text_a == text_b else score_or_nothing(text_b, question.texts, gold.version_2, language)
        )
        scores[:, i] = exact_a, exact_b, f1_a, f1_b
        if text_a != text_b:
            wording = gold.wording[question.example_id]
            differences.append(
                Difference(question.example_id, wording, question.texts, text_a, text_b, exact_a, exact_b, f1_a, f1_b)
            )
    differences.sort(key=lambda d: (-abs(d.f1_b - d.f1_a), -abs(d.exact_b - d.exact_a), d.example_id))
    paragraph = paragraph_numbers(gold, [question.example_id for question in questions])
    report: dict[str, Any] = {"total": len(questions)}
    for name, (of_a, of_b) in (("exact", scores[:2]), ("f1", scores[2:])):
        paired = paired_difference(of_a, of_b, paragraph)
        report[f"{name}_a"], report[f"{name}_b"] = 100 * float(of_a.mean()), 100 * float(of_b.mean())
        report[f"{name}_difference"] = 100 * paired.difference
        report[f"{name}_difference_interval"] = [100 * paired.interval.low, 100 * paired.interval.high]
        report[f"{name}_p_value"] = paired.p_value
    change = np.array([d.f1_b - d.f1_a for d in differences])
    return report | {
        "different": len(differences),
        "better_in_b": int((change > 0).sum()),
        "worse_in_b": int((change < 0).sum()),
        "same_f1": int((change == 0).sum()),
        "differences": [asdict(difference) for difference in differences],
    }


def paragraph_numbers(gold: GoldFile, example_ids: list[str]) -> np.ndarray:
    """The number of each question's paragraph; int [questions]."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(gold.contexts[example_id], len(numbers)) for example_id in example_ids], int)


def explanation_lines(report: dict[str, Any]) -> list[str]:
    """The report of `explain` as lines for a terminal: a summary, then one line per difference."""
    lines = []
    for name in ("exact", "f1"):
        low, high = report[f"{name}_difference_interval"]
        scores = f"A {report[f'{name}_a']:.2f}  B {report[f'{name}_b']:.2f}"
        difference = f"B - A {report[f'{name}_difference']:+.2f}  95% {low:+.2f} to {high:+.2f}"
        lines.append(f"{name:5}  {scores}  {difference}  p {report[f'{name}_p_value']:.4f}")
    lines.append(
        f"{report['different']} of {report['total']} questions answered differently: better in B "
        f"{report['better_in_b']}, worse in B {report['worse_in_b']}, same F1 {report['same_f1']}"
    )
    for d in report["differences"]:
        points = 100 * (d["f1_b"] - d["f1_a"]) / report["total"]
        cost = f"F1 {d['f1_a']:.2f} -> {d['f1_b']:.2f} ({points:+.4f} points)"
        texts = f"A {d['a']!r}  B {d['b']!r}  gold {list(dict.fromkeys(d['gold']))!r}"
        lines.append(f"{d['example_id']}  {cost}  {texts}  question {d['question']!r}")
    return lines


def score_or_nothing(text: str | None, golds: tuple[str, ...], version_2: bool, language: str) -> tuple[int, float]:
    """Exact match and F1 of an answer, 0 for a question without one."""
    return (0, 0.0) if text is None else score_answer(text, golds, version_2, language)
