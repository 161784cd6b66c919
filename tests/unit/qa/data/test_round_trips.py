"""Random SQuAD files in every layout and every way of counting give the same questions and answers."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qa_deepspeed.qa.data.read_report import ReadReport
from qa_deepspeed.qa.data.reading import DataSource, read_examples
from tests.unit.qa.data.test_offsets import COUNTS


@dataclass(frozen=True)
class Asked:
    """A question with its answer; `start` as the file counts."""

    number: int
    context: str
    text: str
    start: int

    @property
    def question(self) -> str:
        return f"{self.number}?"

    def row(self) -> dict[str, Any]:
        return {"id": f"q{self.number}", "question": self.question, "context": self.context}

    def answers(self) -> dict[str, Any]:
        return {"text": [self.text], "answer_start": [self.start]}

    def flat(self) -> dict[str, Any]:
        return {**self.row(), "answer_text": self.text, "answer_start": self.start}

    def span(self) -> dict[str, Any]:
        return {"start": self.start, "end": self.start + len(self.text), "text": self.text, "labels": ["Answer"]}

    def nested(self, **answers: Any) -> dict[str, Any]:
        return {"context": self.context, "qas": [{"id": f"q{self.number}", "question": self.question, **answers}]}


def as_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def as_lines(path: Path, values: list[Any]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def as_table(path: Path, rows: list[dict[str, Any]], delimiter: str = ",", encoding: str = "utf-8") -> None:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def numpy_cell(one: Asked) -> str:
    return repr({"text": np.array([one.text], dtype=object), "answer_start": np.array([one.start])})


def mrqa(one: Asked) -> dict[str, Any]:
    answer = {"text": one.text, "char_spans": [[one.start, one.start + len(one.text) - 1]]}
    asked = {"qid": f"q{one.number}", "question": one.question, "answers": [one.text], "detected_answers": [answer]}
    return {"context": one.context, "qas": [asked]}


def packed(path: Path, asked: list[Asked]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(mrqa(one)) + "\n" for one in asked).encode()))


WRITERS: dict[str, Callable[[Path, list[Asked]], None]] = {
    "squad.json": lambda path, asked: as_json(
        path,
        {"data": [{"paragraphs": [one.nested(answers=[one.span() | {"answer_start": one.start}])]} for one in asked]},
    ),
    "korquad.json": lambda path, asked: as_json(
        path, {"data": [one.nested(answer={"text": one.text, "answer_start": one.start}) for one in asked]}
    ),
    "rows.json": lambda path, asked: as_json(path, [{**one.row(), "answers": one.answers()} for one in asked]),
    "simpletransformers.json": lambda path, asked: as_json(
        path, [one.nested(answers=[{"text": one.text, "answer_start": one.start}]) for one in asked]
    ),
    "mrqa.jsonl": lambda path, asked: as_lines(path, [{"header": {"dataset": "x"}}, *map(mrqa, asked)]),
    "mrqa.jsonl.gz": packed,
    "labelstudio.json": lambda path, asked: as_json(
        path,
        [{"id": f"q{o.number}", "text": o.context, "question": o.question, "answer": [o.span()]} for o in asked],
    ),
    "labelstudio_full.json": lambda path, asked: as_json(
        path,
        [
            {
                "id": f"q{one.number}",
                "data": {"text": one.context, "question": one.question},
                "annotations": [{"result": [{"value": one.span()}]}],
            }
            for one in asked
        ],
    ),
    "flat.jsonl": lambda path, asked: as_lines(path, [one.flat() for one in asked]),
    "split.json": lambda path, asked: as_json(
        path, {"train": [one.flat() for one in asked], "test": [asked[0].flat()]}
    ),
    "pandas.json": lambda path, asked: as_json(
        path, {name: {str(n): one.flat()[name] for n, one in enumerate(asked)} for name in asked[0].flat()}
    ),
    "text_starts.json": lambda path, asked: as_json(
        path, [{**one.flat(), "answer_start": f"{one.start}.0"} for one in asked]
    ),
    "columns.csv": lambda path, asked: as_table(path, [one.flat() for one in asked]),
    "excel.csv": lambda path, asked: as_table(path, [one.flat() for one in asked], ";", "utf-8-sig"),
    "utf16.tsv": lambda path, asked: as_table(path, [one.flat() for one in asked], "\t", "utf-16"),
    "cells.csv": lambda path, asked: as_table(
        path, [{**one.row(), "answers": json.dumps(one.answers())} for one in asked]
    ),
    "python.csv": lambda path, asked: as_table(path, [{**one.row(), "answers": str(one.answers())} for one in asked]),
    "numpy.csv": lambda path, asked: as_table(path, [{**one.row(), "answers": numpy_cell(one)} for one in asked]),
    "rows.parquet": lambda path, asked: pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{**one.row(), "answers": one.answers()} for one in asked]), path
    ),
}
"""Name of a file -> writes questions in its layout."""

CODE_POINTS: dict[str, Callable[[str, int], int]] = {"characters": lambda context, start: start}

LETTERS = st.text(alphabet='ab é東😀\n"', max_size=20)

PARTS = st.lists(st.tuples(LETTERS, st.sampled_from(["\U0001f600", "é", "\r\n", "x"]), LETTERS), min_size=4, max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=400, deadline=None)
@given(name=st.sampled_from(sorted(WRITERS)), way=st.sampled_from(sorted(CODE_POINTS | COUNTS)), parts=PARTS)
def test_every_layout_and_way_of_counting_comes_back_equal(
    tmp_path: Path, name: str, way: str, parts: list[tuple[str, str, str]]
) -> None:
    """Every answer is a word that stands once in its context, behind characters that each way counts otherwise."""
    count = (CODE_POINTS | COUNTS)[way]
    contexts = [f"\U0001f600é\r\n{before}{mark} answer{n}. {after}" for n, (before, mark, after) in enumerate(parts)]
    starts = [context.index("answer") for context in contexts]
    asked = [
        Asked(n, context, f"answer{n}", count(context, start))
        for n, (context, start) in enumerate(zip(contexts, starts, strict=True))
    ]
    path = tmp_path / name
    WRITERS[name](path, asked)
    report = ReadReport()
    examples = list(read_examples(DataSource((str(path),), "train", False), report))
    found = [(one.example_id, one.question, one.context, one.answers[0].text, one.answers[0].start) for one in examples]
    assert found == [
        (f"q{n}", f"{n}?", context, f"answer{n}", start)
        for n, (context, start) in enumerate(zip(contexts, starts, strict=True))
    ]
    assert report.rejected == [] and report.repaired == 0


def test_a_workbook_comes_back_equal(tmp_path: Path) -> None:
    """Its cells hold no carriage returns, which XML does not keep."""
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl (the extra [xlsx]) is not installed")
    for way, count in (CODE_POINTS | COUNTS).items():
        contexts = [f"\U0001f600é {n * 'é東😀'} answer{n}." for n in range(5)]
        asked = [Asked(n, one, f"answer{n}", count(one, one.index("answer"))) for n, one in enumerate(contexts)]
        sheet = (book := openpyxl.Workbook()).active
        for row in (list(asked[0].flat()), *(list(one.flat().values()) for one in asked)):
            sheet.append(row)
        book.save(tmp_path / "d.xlsx")
        report = ReadReport()
        examples = list(read_examples(DataSource((str(tmp_path / "d.xlsx"),), "train", False), report))
        assert [one.answers[0].start for one in examples] == [one.index("answer") for one in contexts], way
        assert report.repaired == 0
