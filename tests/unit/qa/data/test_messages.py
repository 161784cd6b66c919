"""Messages about data name the way out: every reason for a rejection, every error, and what a rejected answer is."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from qa_deepspeed.cli.main import COMMANDS
from qa_deepspeed.config.options import fields_of
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.qa.data import files, formats, reasons, tables
from qa_deepspeed.qa.data.read_report import ReadReport, Rejected
from qa_deepspeed.qa.data.reading import DataSource, read_examples
from qa_deepspeed.qa.data.reasons import Reason, advice
from tests.paths import REPOSITORY

FOLDER = REPOSITORY / "qa_deepspeed/qa/data"

ALL_REASONS = {name: reason for name, reason in vars(Reason).items() if name.isupper()}

VERBS = "change|check|convert|copy|correct|get|name|pass|put|raise|remove|rename|save|unpack|write"
"""How a way out begins."""


def names_a_way_out(message: str) -> bool:
    """Whether a message says what to do: an imperative after a colon, semicolon, comma or `or`."""
    return re.search(rf"([:;,] |\bor |^)({VERBS})\b", message) is not None


@pytest.mark.parametrize("name", ALL_REASONS)
def test_every_reason_has_a_way_out(name: str) -> None:
    reason = ALL_REASONS[name]
    assert reason in reasons._ADVICE
    assert names_a_way_out(advice(reason))
    line = str(Rejected("q", "d.json: line 3", reason, "it is 3"))
    assert line == f"d.json: line 3: {reason} (it is 3); {advice(reason)}"


def test_options_in_advice_are_options_of_training() -> None:
    known = {field.name for field in fields_of(RunOptions, "train")}
    for reason in ALL_REASONS.values():
        assert set(re.findall(r"--(\w+)", advice(reason))) <= known
    assert {"no_such_reason"} - set(ALL_REASONS.values())  # a report of an earlier version may have others
    assert names_a_way_out(advice("no_such_reason"))


CONSTANTS: dict[str, str] = {
    "ENCODING_ADVICE": files.ENCODING_ADVICE,
    "LAYOUTS": reasons.LAYOUTS,
    "_JSON_ADVICE": formats._JSON_ADVICE,
    "_QUOTE_ADVICE": tables._QUOTE_ADVICE,
}


def error_messages() -> list[tuple[str, str]]:
    """Place and text of each UserError of the folder, with its constants, and `{}` for other values."""
    found = []
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                found.append((f"{path.name}:{node.lineno}", text_of(node.args[0])))
    return found


def text_of(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.FormattedValue):
        return CONSTANTS.get(ast.unparse(node.value), "{}")
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    raise AssertionError(f"a message that is neither text nor f-string: {ast.unparse(node)}")


MADE_ELSEWHERE = {
    "{}: {}": "of files of other kinds, and of CSV: tested in test_layouts.py and test_formats.py",
    "{}: no usable question: {}": "of what was rejected: tested in test_reading.py",
}
"""Messages whose end is not written where they are raised."""


def test_there_are_errors_to_look_at() -> None:
    assert len(error_messages()) > 20
    assert {text for _, text in error_messages()} >= MADE_ELSEWHERE.keys()


@pytest.mark.parametrize(("place", "message"), error_messages(), ids=[place for place, _ in error_messages()])
def test_every_error_has_a_way_out(place: str, message: str) -> None:
    assert message in MADE_ELSEWHERE or names_a_way_out(message)


@pytest.mark.parametrize("what", files._OTHER_FILES.values())
def test_every_other_kind_of_file_has_a_way_out(what: str) -> None:
    assert names_a_way_out(what)


def rejected(tmp_path: Path, context: Any, answers: Any, **more: Any) -> str:
    """The line about the one question that is rejected of a file of two."""
    good = {"id": "good", "question": "?", "context": "One.", "answers": [{"text": "One", "answer_start": 0}]}
    path = tmp_path / "d.json"
    path.write_text(json.dumps([good, {"id": "x", "question": "?", "context": context, "answers": answers, **more}]))
    report = ReadReport()
    list(read_examples(DataSource((str(path),), "train", False), report))
    assert ReadReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    (one,) = report.rejected
    assert report.advice() == [f"{one.reason}: {advice(one.reason)}"]
    assert report.left_out() == [f"left out: {one}"]
    report.write_rejected(tmp_path / "rejected.jsonl")
    row = json.loads((tmp_path / "rejected.jsonl").read_text())
    assert row.get("detail", "") == one.detail and row["reason"] == one.reason
    return one.detail


CONTEXT = "The kiln was built in 1871 by Ida Brook. It’s  old – Ida Brook knew."


@pytest.mark.parametrize(
    ("text", "start", "detail"),
    [
        ("ida brook", 3, "'ida brook': differs in case at 30"),
        ("It's old", 0, '"It\'s old": differs in quotation marks, dashes or blanks at 41'),
        ("was  built", 0, "'was  built': differs in blanks at 9"),
        ("built in 1872", 9, "'built in 1872': its beginning 'built in 187' is there at 13"),
        ("Zebra", 0, "'Zebra': nothing like it is there"),
        ("1871", 60, "'1871': answer_start is 60, it stands at 22"),
        ("Ida Brook", 99, "'Ida Brook': answer_start is 99, it stands at 53, the nearest of 2 places"),
        ("Ida Brook", -1, "'Ida Brook': it stands at 30, the nearest of 2 places"),
        ("Ida Brook", "x", "'Ida Brook': answer_start is 'x'"),
        (7, 0, "it is 7"),
        ("  ", 0, "it is '  '"),
        ("x" * 50, 0, f"'{'x' * 37}...': nothing like it is there"),
    ],
)
def test_a_rejected_answer_is_shown_with_the_nearest_place(tmp_path: Path, text: Any, start: Any, detail: str) -> None:
    assert rejected(tmp_path, CONTEXT, [{"text": text, "answer_start": start}]) == detail


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"context": 7}, "it is 7"),
        ({"context": None, "body": "x"}, "there are id, question, context, answers, body"),
        ({"question": None}, "there are id, question, context, answers"),
        ({"question": ["?"]}, "it is ['?']"),
        ({"answers": None, "note": 1}, "there are id, question, context, answers, note"),
        ({"answers": 5}, "it is 5"),
        ({"answers": {"text": ["a", "b"], "answer_start": [1]}}, "it is {'text': ['a', 'b'], 'answer_start': ..."),
        ({"is_impossible": "maybe"}, "it is 'maybe'"),
    ],
)
def test_what_stands_in_place_of_a_field_is_shown(tmp_path: Path, fields: dict[str, Any], detail: str) -> None:
    made = {"context": CONTEXT, "answers": [{"text": "1871", "answer_start": 22}], **fields}
    assert rejected(tmp_path, **made) == detail


def test_commands_that_advice_names_are_there() -> None:
    for reason in ALL_REASONS.values():
        assert set(re.findall(r"qa-deepspeed (\w+)", advice(reason))) <= COMMANDS.keys()
