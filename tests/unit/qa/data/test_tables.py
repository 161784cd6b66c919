"""Tables: Excel workbooks, and cells of CSV files that hold rows because of a quotation mark."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qa_deepspeed.qa.data import tables
from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.data.read_report import ReadReport
from qa_deepspeed.qa.data.reading import DataSource, read_examples
from qa_deepspeed.qa.data.reasons import Reason
from qa_deepspeed.utils.errors import UserError
from tests.unit.qa.data.test_messages import names_a_way_out

CONTEXT = "The kiln was built in 1871 by Ida Brook. It fired roof tiles."
HEADER = ("id", "question", "context", "answer_text", "answer_start")
ROWS = [("a", "Who built it?", CONTEXT, "Ida Brook", 30), ("b", "When?", CONTEXT, "1871", 22)]


def read(path: Path, **more: Any) -> tuple[list[Example], ReadReport]:
    report = ReadReport()
    return list(read_examples(DataSource((str(path),), "train", True, **more), report)), report


def workbook(path: Path, sheets: dict[str, list[tuple[Any, ...]]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl (the extra [xlsx]) is not installed")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_the_first_sheet_of_a_workbook_is_read(tmp_path: Path) -> None:
    blank: tuple[Any, ...] = (None,) * 5
    path = workbook(tmp_path / "d.xlsx", {"qa": [blank, HEADER, *ROWS, blank, (3, "Why?", CONTEXT, None, None)]})
    examples, report = read(path)
    assert [(one.example_id, one.answers[0].text, one.answers[0].start) for one in examples] == [
        ("a", "Ida Brook", 30),
        ("b", "1871", 22),
    ]
    assert [(one.where, one.reason) for one in report.rejected] == [(f"{path}: sheet qa, row 6", Reason.NO_ANSWER_LIST)]
    assert report.notes == []


def test_numbers_dates_and_other_sheets_of_a_workbook(tmp_path: Path) -> None:
    header = ("id", "question", "context", "answer_text", "answer_start", "is_impossible")
    rows = [(1, "When?", CONTEXT, 1871, 22.0, False), (2, "Why?", CONTEXT, None, None, True)]
    path = workbook(tmp_path / "d.xlsx", {"data": [header, *rows], "notes": [("x",)]})
    examples, report = read(path)
    assert [(one.example_id, len(one.answers)) for one in examples] == [("1", 1), ("2", 0)]
    assert examples[0].answers[0].text == "1871" and report.rejected == []
    assert report.notes == ["d.xlsx: of its 2 sheets the first, data, is read"]


@pytest.mark.parametrize(
    ("sheets", "message"),
    [({"a": []}, "the first sheet is empty"), ({"a": [("id", "question"), (1, "?")]}, "no column 'context'")],
)
def test_workbooks_without_questions(tmp_path: Path, sheets: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(workbook(tmp_path / "d.xlsx", sheets))
    assert names_a_way_out(str(caught.value))


@pytest.mark.parametrize("content", [b"", b"id,question", b"PK\x03\x04rest"])
def test_what_is_no_workbook_is_one_line(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("openpyxl", reason="openpyxl (the extra [xlsx]) is not installed")
    path = tmp_path / "d.xlsx"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not an Excel workbook, or damaged") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_without_openpyxl_a_workbook_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    path = tmp_path / "d.xlsx"
    path.write_bytes(b"PK\x03\x04rest")
    with pytest.raises(UserError, match="pip install openpyxl, or save the sheet as CSV"):
        read(path)


def lines_of(rows: list[tuple[Any, ...]], delimiter: str) -> str:
    return "".join(delimiter.join(map(str, row)) + "\n" for row in rows)


@pytest.mark.parametrize("swallowed", [1, 2, 7])
def test_a_cell_that_swallows_rows_is_said_with_its_line(tmp_path: Path, swallowed: int) -> None:
    """A context that begins with a quotation mark, in a table that quotes nothing, up to one that ends with it."""
    plain = [(f"r{n}", "When?", CONTEXT, "1871", 22) for n in range(20)]
    plain[4] = ("r4", "When?", f'"{CONTEXT}', "1871", 23)
    plain[4 + swallowed] = ("end", "When?", f'{CONTEXT}"', "1871", 22)
    path = tmp_path / "d.tsv"
    path.write_text(lines_of([HEADER, *plain], "\t"))
    examples, report = read(path)
    assert len(examples) == 20 - 1 - swallowed
    (one,) = report.rejected
    assert (one.example_id, one.where, one.reason) == ("r4", f"{path}: line 6", Reason.SWALLOWED_ROWS)
    held = "the next row" if swallowed == 1 else f"the next {swallowed} rows"
    assert one.detail == f"the cell in column 3 begins with a quotation mark and holds {held}"
    assert names_a_way_out(str(one))


def test_a_cell_that_swallows_the_rest_of_the_file_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "d.tsv"
    path.write_text(lines_of([HEADER, *ROWS, ("c", "When?", f'"{CONTEXT}', "1871", 23), *ROWS], "\t"))
    with pytest.raises(UserError, match="line 4: a cell of the row that begins there has a quotation mark at its beg"):
        read(path)


def test_a_quotation_mark_inside_of_a_quoted_cell_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text(lines_of([HEADER, *ROWS, ("c", "When?", '"a "b" c"', "b", 3)], ","))
    with pytest.raises(UserError, match="line 4 begins a row that is not CSV") as caught:
        read(path)
    assert names_a_way_out(str(caught.value))


TEXT = st.text(alphabet='ab ,;\t|\n"\r', max_size=30)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(contexts=st.lists(TEXT, min_size=1, max_size=6), delimiter=st.sampled_from(",;\t|"))
def test_cells_with_line_breaks_that_are_quoted_rightly_are_read(
    tmp_path: Path, contexts: list[str], delimiter: str
) -> None:
    """No text that a CSV writer quotes is taken for rows, short of one with the delimiters of rows at their places."""
    texts = [f"{text.replace(delimiter, f'{delimiter} ')}x" for text in contexts]
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(HEADER)
    writer.writerows((str(n), "?", text, "x", len(text) - 1) for n, text in enumerate(texts))
    path = tmp_path / "d.csv"
    path.write_text(out.getvalue(), newline="")
    examples, report = read(path)
    assert [one.context for one in examples] == texts and report.rejected == []


@pytest.mark.parametrize("bad_line", [1, 2, 900])
def test_a_byte_of_another_encoding_is_said_with_its_line(tmp_path: Path, bad_line: int) -> None:
    lines = [",".join(HEADER), *[f"{n},When?,Built in 1871.,1871,9" for n in range(1000)]]
    lines[bad_line - 1] += "é" if bad_line > 1 else ",é"
    path = tmp_path / "d.csv"
    path.write_bytes("\n".join(lines).encode("cp1252"))
    with pytest.raises(UserError, match=rf"d.csv: line {bad_line}: not UTF-8 text \(byte 0xe9\); convert the file"):
        read(path)
    if bad_line == 1:
        assert len(read(path, encoding="cp1252")[0]) == 1000


def test_documents_need_no_column_of_questions(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("id,text\na,Some words.\n")
    columns = DataSource((str(path),), "train", True).columns
    (passage,) = tables.csv_passages(str(path), columns, None, ("context",))
    assert passage.context == "Some words."
