"""The table of questions: it gives back what was added, it fits its limit, and no text of it is markup."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_deepspeed.qa.data.examples import Answer
from qa_deepspeed.qa.report import questions
from qa_deepspeed.qa.report.questions import GivenAnswer, QuestionRecord, QuestionTable, script_json

OUTCOMES = {"wrong": ("Wrong", "not right"), "right": ("Right", "right")}
TEXT = st.text(max_size=20) | st.sampled_from(["</script>", "<!--", "&lt;", "\u2028", "\ud83d", "\ude00", "\0", "😀 x"])


def valid(text: str) -> str:
    """Without halves of surrogate pairs, which no browser can show."""
    return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)


def record(number: int, context: str = "", wrong: bool = False, **changes: Any) -> QuestionRecord:
    values: dict[str, Any] = {
        "example_id": f"q{number}",
        "question": f"question {number}?",
        "context": context or f"context {number // 3} has Ann and Bob",
        "golds": [Answer("Ann", 14 if number < 30 else 15)],
        "answers": [GivenAnswer("Bob", -1, 0.0 if wrong else 1.0, 0.5, (("Bob", -1, 0.5),))],
        "outcome": "wrong" if wrong else "right",
        "wrong": wrong,
    }
    return QuestionRecord(**values | changes)


def read(table: QuestionTable) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(table.data(["A"], {"word": "Word"}))
    return found


@settings(max_examples=300, deadline=None)
@given(TEXT, TEXT, TEXT, st.lists(TEXT, max_size=3), st.integers(-1, 5), TEXT, TEXT)
def test_every_text_comes_back_and_none_is_markup(
    example_id: str, question: str, context: str, golds: list[str], start: int, given_text: str, file: str
) -> None:
    table = QuestionTable(OUTCOMES)
    added = [Answer(gold, start) for gold in golds]
    answer = GivenAnswer(given_text, start, 0.25, 0.5, ((given_text, start, 0.5), ("", -1, 0.5)))
    table.add(QuestionRecord(example_id, question, context, added, [answer], "wrong", True, {"word": file}, "", file))
    data = table.data(["A"], {})
    assert not set(data) & set("<>&\u2028\u2029") and not any("\ud800" <= c <= "\udfff" for c in data)
    found = json.loads(data)
    (row,) = found["rows"]

    def text(span: Any) -> str:
        shown = found["contexts"][row[2]]
        return span if isinstance(span, str) else shown[span[0] : span[0] + span[1]]

    assert row[:2] == [valid(example_id), valid(question)] and found["contexts"] == [valid(context)]
    assert [text(span) for span in row[3]] == [valid(gold) for gold in dict.fromkeys(golds)]
    assert text(row[5][0][0]) == text(row[5][0][3][0][0]) == valid(given_text)
    assert found["words"][row[6][0]] == valid(f"word={file}") and found["words"][row[7]] == valid(f"/{file}")


def test_places_are_kept_where_the_text_stands_there() -> None:
    table = QuestionTable(OUTCOMES)
    answers = [GivenAnswer("Bob", 22, 0.0), GivenAnswer("Bob", 3, 0.0), GivenAnswer("", -1, 0.0)]
    table.add(record(0, "context 0 has Ann and Bob", answers=answers))
    (row,) = read(table)["rows"]
    assert row[3] == [[14, 3]] and [answer[0] for answer in row[5]] == [[22, 3], "Bob", ""]


def test_contexts_stand_once() -> None:
    table = QuestionTable(OUTCOMES)
    for number in range(9):
        table.add(record(number))
    found = read(table)
    assert len(found["contexts"]) == 3 and [row[2] for row in found["rows"]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [row[0] for row in found["rows"]] == [f"q{number}" for number in range(9)]


@pytest.mark.parametrize("limit", [1500, 20000])
def test_a_full_table_fits_its_limit_with_mistakes_first(limit: int) -> None:
    table = QuestionTable(OUTCOMES, limit)
    for number in range(400):
        table.add(record(number, wrong=number % 16 == 0))
    found = read(table)
    assert len(table) == len(found["rows"]) < table.total == 400
    assert 0.8 * limit < len(table.data(["A"], {}).encode()) < limit + 200
    numbers = [int(row[0][1:]) for row in found["rows"]]
    assert numbers == sorted(numbers), "in the order of the file"
    wrong = [number for number in numbers if number % 16 == 0]
    assert wrong == list(range(0, 400, 16)) or len(wrong) == len(numbers)
    right = [number for number in numbers if number % 16]
    assert not right or max(right) - min(right) > 300, "spread over the file"
    used = {row[2] for row in found["rows"]}
    assert all(bool(context) == (number in used) for number, context in enumerate(found["contexts"]))
    for row in found["rows"]:
        assert found["contexts"][row[2]] == f"context {int(row[0][1:]) // 3} has Ann and Bob"


def test_a_long_context_is_cut_around_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "CONTEXT_CHARACTERS", 60)
    monkeypatch.setattr(questions, "CONTEXT_BEFORE", 20)
    context = "left " * 40 + "Ann met Bob. " + "right " * 40 + "Eve"
    table = QuestionTable(OUTCOMES)
    answers = [GivenAnswer("Bob", 208, 0.0), GivenAnswer("Eve", context.find("Eve"), 0.0)]
    table.add(record(0, context, golds=[Answer("Ann", 200)], answers=answers))
    found = read(table)
    (shown,), (row,) = found["contexts"], found["rows"]
    assert shown == "…" + context[180:240] + "…"
    begin, length = row[3][0]
    assert shown[begin : begin + length] == "Ann" and row[5][1][0] == "Eve"
    begin, length = row[5][0][0]
    assert shown[begin : begin + length] == "Bob"


def test_texts_without_end_are_cut() -> None:
    table = QuestionTable(OUTCOMES)
    answer = GivenAnswer("y" * 10**6, -1, 0.0)
    table.add(record(0, "c", question="x" * 10**6, golds=[Answer("z" * 10**6, -1)], answers=[answer]))
    assert len(table.data(["A"], {})) < 10**4


def test_numbers_that_json_lacks_are_none() -> None:
    table = QuestionTable(OUTCOMES)
    table.add(record(0, answers=[GivenAnswer("Bob", -1, 0.5, float("nan"), (("Bob", -1, float("inf")),))]))
    assert read(table)["rows"][0][5] == [["Bob", None, 0.5, [["Bob", None]]]]
    assert script_json(["<"]) == '["\\u003c"]'
