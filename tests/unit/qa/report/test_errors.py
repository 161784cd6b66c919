"""Classes of errors, against sets of characters and letter patterns; what they cost adds up to the lost F1."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.metrics.squad import score_answer
from qa_deepspeed.qa.report.errors import CLASSES, ErrorCounts, error_class, gold_doubt

CONTEXT = st.text("ab12 中.", min_size=1, max_size=14)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Example, str, int]:
    """An example with up to three gold answers, some without a place, and an answer given with or without one."""
    context = draw(CONTEXT)

    def place() -> tuple[str, int]:
        begin = draw(st.integers(0, len(context) - 1))
        end = draw(st.integers(begin + 1, len(context)))
        return context[begin:end], begin if draw(st.integers(0, 5)) else -1

    golds = tuple(Answer(*place()) for _ in range(draw(st.integers(0, 3))))
    text, start = place() if draw(st.integers(0, 4)) else ("", -1)
    return Example("q", "?", context, golds), text, start


def class_by_sets(example: Example, text: str, start: int, exact: int, f1: float) -> str:
    """The class from sets of character numbers, one gold answer at a time."""
    if exact:
        return "right"
    placed = [gold for gold in example.answers if gold.start >= 0]
    characters = [set(range(gold.start, gold.start + len(gold.text))) for gold in placed]

    def is_cut(gold: Answer) -> bool:
        around = (example.context[max(at - 1, 0) : at + 1] for at in (gold.start, gold.start + len(gold.text)))
        return any(re.fullmatch("[ab][ab]|[12][12]", two) for two in around)

    pairs = [(i, j) for i in range(len(placed)) for j in range(len(placed)) if i != j]
    apart = all(not characters[i] & characters[j] and placed[i].text != placed[j].text for i, j in pairs)
    if example.answers and (not placed or all(map(is_cut, placed)) or (pairs and apart)):
        return "gold_doubtful"
    if not text:
        return "missed"
    if not example.answers:
        return "should_be_empty"
    if start < 0:
        return "boundary" if f1 else "wrong_place"
    given_characters = set(range(start, start + len(text)))
    return "boundary" if any(given_characters & one for one in characters) else "wrong_place"


@settings(max_examples=500, deadline=None)
@given(cases())
def test_classes_equal_those_by_sets_of_characters(case: tuple[Example, str, int]) -> None:
    example, text, start = case
    exact, f1 = score_answer(text, tuple(gold.text for gold in example.answers), True)
    found = error_class(example, text, start, exact, f1)
    assert found == class_by_sets(example, text, start, exact, f1)
    assert bool(gold_doubt(example)) >= (found == "gold_doubtful")


def example(context: str, *golds: str) -> Example:
    return Example("q", "?", context, tuple(Answer(gold, context.find(gold)) for gold in golds))


@pytest.mark.parametrize(
    ("question", "text", "start", "expected"),
    [
        (example("Ann met Bob Smith in Rome.", "Bob Smith"), "Bob", 8, "boundary"),
        (example("Ann met Bob Smith in Rome.", "Bob Smith"), "Rome", 21, "wrong_place"),
        (example("Bob, that is Bob Smith.", "Bob Smith"), "Bob", 0, "wrong_place"),
        (example("Ann met Bob.", "Bob"), "", -1, "missed"),
        (example("Ann met Bob."), "Bob", 8, "should_be_empty"),
        (example("Ann met Bobby.", "Bob"), "Bobby", 8, "gold_doubtful"),
        (example("In 1999.", "99"), "1999", 3, "gold_doubtful"),
        (example("Ann met Bob in Rome.", "Bob", "Rome"), "Ann", 0, "gold_doubtful"),
        (example("Ann met Bob in Rome.", "Eve"), "Ann", 0, "gold_doubtful"),
        (example("他住在北京市。", "北京"), "北京市", 3, "boundary"),
        (example("Ann met Bob.", "bob"), "Bob", 8, "right"),
    ],
)
def test_examples_of_each_class(question: Example, text: str, start: int, expected: str) -> None:
    golds = tuple(gold.text for gold in question.answers)
    assert error_class(question, text, start, *score_answer(text, golds, True)) == expected


def test_the_same_text_at_several_places_is_no_doubt() -> None:
    """As data sets with all occurrences of an answer have it."""
    context = "Rome, then Paris, then Rome."
    twice = Example("q", "?", context, (Answer("Rome", 0), Answer("Rome", 23)))
    assert gold_doubt(twice) == "" and error_class(twice, "Paris", 11, 0, 0.0) == "wrong_place"


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(CLASSES)), st.floats(0, 1)), min_size=1))
def test_lost_points_add_up_to_what_f1_lacks(answers: list[tuple[str, float]]) -> None:
    counts = ErrorCounts()
    for error, f1 in answers:
        counts.add(error, f1)
    report = counts.report()
    lacks = 100 - 100 * sum(f1 for _, f1 in answers) / len(answers)
    assert sum(row["lost_f1"] for row in report.values()) == pytest.approx(lacks)
    assert sum(row["questions"] for row in report.values()) == len(answers)
    assert sum(row["part_of_lost_f1"] for row in report.values()) == pytest.approx(1 if lacks else 0)


def test_without_questions_nothing_is_lost() -> None:
    assert all(not any(row.values()) for row in ErrorCounts().report().values())
