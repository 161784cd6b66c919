"""answer_start counted in other ways: decided for a file, and the same answers come back."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.data.read_report import ReadReport
from qa_deepspeed.qa.data.reading import DataSource, read_examples

# Start in code points -> start as another tool counts it.
COUNTS: dict[str, Callable[[str, int], int]] = {
    "UTF-16 units": lambda context, start: len(context[:start].encode("utf-16-le")) // 2,
    "bytes of UTF-8": lambda context, start: len(context[:start].encode()),
    "Windows line ends as one character": lambda context, start: len(context[:start].replace("\r\n", "\n")),
    "characters from 1": lambda context, start: start + 1,
}


def read(path: Path, purpose: Any = "train") -> tuple[list[Example], ReadReport]:
    report = ReadReport()
    return list(read_examples(DataSource((str(path),), purpose, False), report)), report


def write(path: Path, paragraphs: list[tuple[str, list[tuple[str, int]]]]) -> Path:
    """A file with contexts and the (text, answer_start) of a question each."""
    made = [
        {
            "context": context,
            "qas": [
                {"id": f"{p}-{q}", "question": "?", "answers": [{"text": text, "answer_start": start}]}
                for q, (text, start) in enumerate(answers)
            ],
        }
        for p, (context, answers) in enumerate(paragraphs)
    ]
    path.write_text(json.dumps({"data": [{"paragraphs": made}]}), encoding="utf-8")
    return path


CONTEXTS = [
    "\U0001f600 Guest 1 came from Town1.\r\n\U0001f600 Größe 2, guest 2 came from Town2.\r\n",
    "plain words only, with number 7",
    "東大寺は奈良にある。\r\n😀 the end of it, and a tail that is longer than ten characters",
]
TEXTS = [["Guest", "Town1", "Größe", "Town2"], ["words", "number"], ["奈良", "end of", "tail"]]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_each_way_of_counting_is_found_and_said(tmp_path: Path, name: str, purpose: str) -> None:
    places = [[(text, context.index(text)) for text in texts] for context, texts in zip(CONTEXTS, TEXTS, strict=True)]
    other = [
        (context, [(text, COUNTS[name](context, start)) for text, start in found])
        for context, found in zip(CONTEXTS, places, strict=True)
    ]
    examples, report = read(write(tmp_path / "d.json", other), purpose)
    expected = [pair for found in places for pair in found]
    assert [(one.answers[0].text, one.answers[0].start) for one in examples] == expected
    assert report.repaired == 0 and report.notes == [f"d.json: answer_start counts {name}: 9 of 9 answers match"]
    assert report.notes[0] in report.summary()
    assert ReadReport.from_dict(report.to_dict()) == report


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("name", COUNTS)
def test_cells_of_tables_are_counted_too(tmp_path: Path, name: str, columns: bool) -> None:
    """Text and start in columns of their own, or answers as JSON in one cell."""
    expected = [
        (context, text, context.index(text)) for context, texts in zip(CONTEXTS, TEXTS, strict=True) for text in texts
    ]
    path = tmp_path / "d.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "context", *(("answer_text", "answer_start") if columns else ("answers",))])
        for number, (context, text, start) in enumerate(expected):
            counted = COUNTS[name](context, start)
            cell = json.dumps({"text": [text], "answer_start": [counted]})
            writer.writerow([f"{number}?", context, *((text, counted) if columns else (cell,))])
    examples, report = read(path)
    assert [(one.context, one.answers[0].text, one.answers[0].start) for one in examples] == expected
    assert report.repaired == 0 and report.notes == [f"d.csv: answer_start counts {name}: 9 of 9 answers match"]


def test_a_file_in_code_points_with_a_few_wrong_answers_stays_as_it_is(tmp_path: Path) -> None:
    right = [(CONTEXTS[0], [("Guest", CONTEXTS[0].index("Guest")), ("Town1", CONTEXTS[0].index("Town1"))])] * 10
    wrong = [(CONTEXTS[1], [("number", CONTEXTS[1].index("number") + 1)])]
    _, report = read(write(tmp_path / "d.json", wrong + right))
    assert report.notes == [] and report.repaired == 1
