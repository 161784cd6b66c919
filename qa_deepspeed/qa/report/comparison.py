"""The page of two sets of answers to the same questions: what one wins and the other loses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qa_deepspeed.qa.decoding.predictions import NBestEntry
from qa_deepspeed.qa.metrics.compare import score_or_nothing
from qa_deepspeed.qa.metrics.prediction_files import GoldFile
from qa_deepspeed.qa.report.analysis import slices_of
from qa_deepspeed.qa.report.page import render
from qa_deepspeed.qa.report.questions import NBEST_SHOWN, GivenAnswer, QuestionRecord, QuestionTable
from qa_deepspeed.qa.report.words import interval

TEMPLATE = "compare.html.j2"

WON, LOST, BOTH_RIGHT, BOTH_WRONG = "won", "lost", "both_right", "both_wrong"

SIGNIFICANT = 0.05
"""A difference with a smaller p value is called significant."""


@dataclass(frozen=True)
class SystemAnswers:
    """One system's name, its answers by question id, and its n-best lists where it has some."""

    name: str
    predictions: Mapping[str, str]
    nbest: Mapping[str, Sequence[NBestEntry]] = field(default_factory=dict)


def comparison_page(
    gold: GoldFile,
    systems: tuple[SystemAnswers, SystemAnswers],
    differences: Mapping[str, Any],
    language: str,
    about: Mapping[str, str],
    settings: Sequence[Sequence[str]],
) -> str:
    """The HTML document that compares the second system with the first.

    Args:
        differences: `qa.metrics.compare.explain` of the same answers.
        about: data, date and so on, by name.
        settings: rows of a table of what differs between the systems: name, and value of each.
    """
    one, other = (system.name for system in systems)
    outcomes = {
        WON: (f"Won by {other}", f"{other} has the higher F1"),
        LOST: (f"Lost by {other}", f"{one} has the higher F1"),
        BOTH_WRONG: ("Same F1, not right", "both answers are wrong, or partly right to the same degree"),
        BOTH_RIGHT: ("Both right", "both have F1 100"),
    }
    table = QuestionTable(outcomes)
    counts: Counter[str] = Counter()
    for record in _records(gold, systems, language):
        table.add(record)
        counts[record.outcome] += 1
    return render(
        TEMPLATE,
        table,
        [one, other],
        title=f"{other} compared with {one}",
        about=about,
        cards=_cards(one, other, differences),
        verdict=verdict(one, other, differences),
        outcomes=[(key, *words, counts[key]) for key, words in outcomes.items()],
        names=(one, other),
        settings=settings,
    )


def verdict(one: str, other: str, differences: Mapping[str, Any]) -> str:
    """Whether the difference in F1 is more than chance, in words."""
    low, high = differences["f1_difference_interval"]
    significant = differences["f1_p_value"] < SIGNIFICANT
    return (
        f"{other} against {one}: F1 {differences['f1_b']:.2f} against {differences['f1_a']:.2f} on "
        f"{differences['total']} questions, {differences['f1_difference']:+.2f} (95% interval {low:+.2f} to "
        f"{high:+.2f}, p = {differences['f1_p_value']:.3f}): {'significant' if significant else 'not significant'}"
    )


def _cards(one: str, other: str, differences: Mapping[str, Any]) -> list[dict[str, str]]:
    cards = [
        {
            "name": f"F1 of {name}",
            "value": f"{differences[f'f1_{letter}']:.1f}",
            "interval": "",
            "hint": f"exact match {differences[f'exact_{letter}']:.1f}",
        }
        for name, letter in ((one, "a"), (other, "b"))
    ]
    for metric, name in (("f1", "Change in F1"), ("exact", "Change in exact match")):
        hint = f"p = {differences[f'{metric}_p_value']:.3f}; below {SIGNIFICANT} is more than chance"
        value, ends = f"{differences[f'{metric}_difference']:+.1f}", differences[f"{metric}_difference_interval"]
        cards.append({"name": name, "value": value, "interval": f"95% interval {interval(ends)}", "hint": hint})
    return cards


def _records(gold: GoldFile, systems: tuple[SystemAnswers, SystemAnswers], language: str) -> list[QuestionRecord]:
    records = []
    for question in {question.example_id: question for question in gold.questions}.values():
        example_id, context = question.example_id, gold.contexts[question.example_id]
        answers = []
        for system in systems:
            text = system.predictions.get(example_id)
            _, f1 = score_or_nothing(text, question.texts, gold.version_2, language)
            answers.append(_given(text, f1, system.nbest.get(example_id, ()), context))
        change = answers[1].f1 - answers[0].f1
        same = BOTH_RIGHT if answers[0].f1 == 1 else BOTH_WRONG
        missing = [system.name for system in systems if example_id not in system.predictions]
        records.append(
            QuestionRecord(
                example_id=example_id,
                question=gold.wording[example_id],
                context=context,
                golds=gold.places(question),
                answers=answers,
                outcome=WON if change > 0 else LOST if change < 0 else same,
                wrong=change != 0,
                slices=slices_of(gold, question),
                file=gold.files.get(example_id, ""),
                note=f"no prediction of {' and '.join(missing)}" if missing else "",
            )
        )
    return records


def _given(text: str | None, f1: float, nbest: Sequence[NBestEntry], context: str) -> GivenAnswer:
    """The answer with its place: that of its n-best entry, or the only one where the context has the text."""
    text = text or ""
    entry = next((entry for entry in nbest if entry[0] == text), None)
    start = entry[-1] if entry else only_place(context, text)
    best = tuple((entry[0], entry[-1], entry[1]) for entry in nbest[:NBEST_SHOWN])
    return GivenAnswer(text, start, f1, entry[1] if entry else None, best)


def only_place(context: str, text: str) -> int:
    """Where the context has the text, if it has it once; else -1."""
    first = context.find(text) if text else -1
    return first if first == context.rfind(text) else -1
