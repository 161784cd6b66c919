"""Rows of tables: CSV with any of the usual delimiters, Excel workbooks, and Parquet."""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import astuple
from typing import TYPE_CHECKING, Any, TextIO

from qa_deepspeed.qa.data.files import (
    ENCODING_ADVICE,
    RECORD_LIMIT,
    line_of_bad_byte,
    open_binary,
    open_text,
    too_long,
)
from qa_deepspeed.qa.data.layouts import (
    CONTEXT_COLUMNS,
    SPAN_LISTS,
    START_COLUMNS,
    TEXT_COLUMNS,
    ColumnNames,
    row_fields,
)
from qa_deepspeed.qa.data.reasons import Reason
from qa_deepspeed.qa.data.validation import Passage
from qa_deepspeed.utils.errors import UserError

if TYPE_CHECKING:
    import pyarrow

QUESTIONS = ("question", "context")
"""Fields that a table of questions must have; one of documents needs the context alone."""

_PARQUET_ROWS_AT_ONCE = 1024
_CSV_FIELD_LIMIT = 2**31 - 1
_DELIMITERS = ",;\t|"

_QUOTE_ADVICE = "remove the mark, or double it and enclose the cell in quotation marks"


def flat_row(row: dict[str, Any], where: str, columns: ColumnNames) -> Passage:
    """The passage of a flat row, which holds one question."""
    context, fields = row_fields(row, columns)
    return Passage(where, context, [fields], numbered=False, names=tuple(row))


def not_squad(where: str) -> Passage:
    """What stands for a thing of unknown layout: one question that will be rejected."""
    return Passage(where, None, [None], numbered=False)


def csv_passages(
    path: str, columns: ColumnNames, encoding: str | None, needed: tuple[str, ...] = QUESTIONS
) -> Iterator[Passage]:
    """The rows of a CSV file; the delimiter is the one that gives its header the most columns."""
    # The limit belongs to the whole process; the default of 131,072 characters is too small for long contexts.
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    with open_text(path, encoding) as text:
        lines = _short_lines(text, path)
        line = 1
        try:
            before, header = next(((number, line) for number, line in enumerate(lines, 1) if line.strip()), (0, ""))
            if not header:
                raise UserError(f"{path}: the file is empty: write rows with question and context into it")
            delimiter = max(_DELIMITERS, key=lambda one: len(next(csv.reader([header], delimiter=one))))
            names = next(csv.reader([header], delimiter=delimiter, skipinitialspace=True))
            blanks = any(name != name.strip() for name in next(csv.reader([header], delimiter=delimiter)))
            names = _usual_names(names, columns)
            _require_columns(path, names, columns, needed)
            reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=blanks)
            line = before + 1
            for cells in reader:
                if cells:
                    passage = flat_row(_named(names, cells), f"{path}: line {line}", columns)
                    several = before + reader.line_num > line
                    fault, detail = _fault_of(cells, len(names), delimiter, several)
                    yield passage._replace(fault=fault, detail=detail) if fault else passage
                line = before + reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}: {_csv_error(error, line)}") from error
        except UnicodeDecodeError as error:
            found = line_of_bad_byte(path, encoding or error.encoding)
            place = f"line {found}" if found else f"on line {line} or after"
            raise UserError(
                f"{path}: {place}: not {error.encoding.upper()} text (byte 0x{error.object[error.start]:02x}); "
                f"{ENCODING_ADVICE}"
            ) from error


def _named(names: list[str], cells: list[str]) -> dict[str, Any]:
    """The cells by column; None where the row is shorter than the header."""
    row: dict[str, Any] = dict(zip(names, cells, strict=False))
    row.update(dict.fromkeys(names[len(cells) :]))
    return row


def _csv_error(error: csv.Error, line: int) -> str:
    if "unexpected end of data" in str(error):
        return (
            f"line {line}: a cell of the row that begins there has a quotation mark at its beginning and none at its "
            f"end, so that the rest of the file is in it: {_QUOTE_ADVICE}"
        )
    return (
        f"line {line} begins a row that is not CSV: {error}: a cell that begins with a quotation mark ends at the next "
        f"one: {_QUOTE_ADVICE}"
    )


def _fault_of(cells: list[str], columns: int, delimiter: str, several_lines: bool) -> tuple[str, str]:
    """Reason and detail for a row that is not what the file meant; blank for any other row."""
    for number, cell in enumerate(cells) if several_lines else ():
        last = columns + number - len(cells)  # the column in which the cell ends, if it holds rows
        if rows := _swallowed_rows(cell, number, last, columns, delimiter):
            held = "the next row" if rows == 1 else f"the next {rows} rows"
            detail = f"the cell in column {number + 1} begins with a quotation mark and holds {held}"
            return Reason.SWALLOWED_ROWS, detail
    if any(cell.strip() for cell in cells[columns:]):
        return Reason.TOO_MANY_CELLS, f"{len(cells)} cells, {columns} columns"
    return "", ""


def _swallowed_rows(cell: str, column: int, last_column: int, columns: int, delimiter: str) -> int:
    """How many following rows a cell holds because it begins with a quotation mark; 0 if it is a cell of text.

    Then its first line has the delimiters of the rest of its row, the last one those before the column where it ends,
    and each between them those of a row. In text a comma or semicolon has a blank after it.
    """
    first, *inner = cell.split("\n")
    if not inner or columns < 3 or f"{delimiter} " in cell:
        return 0
    wanted = [columns - 1 - column, *[columns - 1] * (len(inner) - 1), last_column]
    return len(inner) if [line.count(delimiter) for line in (first, *inner)] == wanted else 0


def excel_passages(
    path: str, columns: ColumnNames, notes: list[str], needed: tuple[str, ...] = QUESTIONS
) -> Iterator[Passage]:
    """The rows of the first sheet of an Excel workbook; its first row that is not blank names the columns.

    A line in `notes` says which sheet it is, if there are several.

    Raises:
        UserError: openpyxl is not installed, the file is no workbook, or lacks a column.
    """
    try:
        import openpyxl
    except ImportError:
        raise UserError(
            f"{path}: an Excel workbook, which openpyxl reads: pip install openpyxl, or save the sheet as CSV"
        ) from None
    with open_binary(path) as data:
        try:
            book = openpyxl.load_workbook(data, read_only=True, data_only=True)
            sheet = book.worksheets[0]
            sheet.reset_dimensions()  # some programs write wrong ones
            if len(book.worksheets) > 1:
                notes.append(f"of its {len(book.worksheets)} sheets the first, {sheet.title}, is read")
            names: list[str] = []
            for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
                if all(cell is None for cell in cells):
                    continue
                if names:
                    row = dict(zip(names, map(_cell, cells), strict=False))
                    yield flat_row(row, f"{path}: sheet {sheet.title}, row {number}", columns)
                else:
                    names = _usual_names(["" if cell is None else str(cell) for cell in cells], columns)
                    _require_columns(path, names, columns, needed)
        except (zipfile.BadZipFile, KeyError, IndexError, ValueError, OSError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{path}: not an Excel workbook, or damaged ({reason}): save it again, or save the sheet as CSV"
            ) from error
    if not names:
        raise UserError(f"{path}: the first sheet is empty: write rows with question and context into it")


def _cell(value: Any) -> Any:
    """A cell as text or number; Excel turns what looks like a date into one."""
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def parquet_passages(path: str, columns: ColumnNames, needed: tuple[str, ...] = QUESTIONS) -> Iterator[Passage]:
    """The rows of a Parquet file; only the columns that may be used are read."""
    import pyarrow
    import pyarrow.parquet

    with open_binary(path) as data, tempfile.TemporaryFile() as unpacked:
        compressed = not isinstance(data, io.BufferedReader)
        if compressed:
            # Parquet is read from its end; unpacking to disk once keeps that cheap and the memory flat.
            shutil.copyfileobj(data, unpacked)
        try:
            table = pyarrow.parquet.ParquetFile(unpacked if compressed else data)
            present = table.schema_arrow.names
            _require_columns(path, present, columns, needed)
            wanted = [name for name in present if name in _used_columns(columns)]
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS_AT_ONCE, columns=wanted):
                for row in _python_rows(batch):
                    number += 1
                    where = f"{path}: row {number}"
                    yield not_squad(where) if row is None else flat_row(row, where, columns)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: not Parquet, or damaged: {reason}; get or write the file again") from error


def _usual_names(header: list[str], columns: ColumnNames) -> list[str]:
    """The names of a header without blanks around them; those that are used get the spelling of `ColumnNames`.

    `Answer Start` is answer_start, unless there is such a column too.
    """
    names = [name.strip() for name in header]
    used = _used_columns(columns)
    spelled = ["_".join(name.lower().replace("-", " ").split()) for name in names]
    return [
        usual if name not in used and usual in used and spelled.count(usual) == 1 else name
        for name, usual in zip(names, spelled, strict=True)
    ]


def _used_columns(columns: ColumnNames) -> set[str]:
    return {name for name in astuple(columns) if name} | {
        *CONTEXT_COLUMNS,
        *TEXT_COLUMNS,
        *START_COLUMNS,
        *SPAN_LISTS,
    }


def _require_columns(path: str, present: list[str], columns: ColumnNames, needed: tuple[str, ...]) -> None:
    """Raises UserError for a table without a column of questions or contexts, or with one that is there twice."""
    used = _used_columns(columns)
    for name in present:
        if name in used and present.count(name) > 1:
            raise UserError(f"{path}: the column '{name}' occurs twice: rename or remove one")
    known = {"question": (columns.question,), "context": (columns.context, *CONTEXT_COLUMNS)}
    for field in needed:
        if not any(name in present for name in known[field]):
            others = [name for name in known[field][1:] if name != known[field][0]]
            also = f" (or {', '.join(others)})" if others else ""
            raise UserError(
                f"{path}: no column '{known[field][0]}' for the {field}{also} among {', '.join(present)}; name it with "
                f"--{field}_column"
            )


def _short_lines(text: TextIO, path: str) -> Iterator[str]:
    number = 0
    while line := text.readline(RECORD_LIMIT + 1):
        number += 1
        if len(line) > RECORD_LIMIT:
            raise too_long(path, number)
        yield line


def _python_rows(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch as Python values; None for one with a value that Python has none for (a timestamp, say)."""
    try:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
    except (ValueError, OverflowError):  # pyarrow's own errors among them
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except (ValueError, OverflowError):
                yield None
    else:
        yield from rows
