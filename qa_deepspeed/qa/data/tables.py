"""Rows of tables: CSV with any of the usual delimiters, and Parquet."""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import astuple
from typing import TYPE_CHECKING, Any, TextIO

from qa_deepspeed.qa.data.files import ENCODING_ADVICE, RECORD_LIMIT, open_binary, open_text, too_long
from qa_deepspeed.qa.data.layouts import (
    CONTEXT_COLUMNS,
    SPAN_LISTS,
    START_COLUMNS,
    TEXT_COLUMNS,
    ColumnNames,
    row_fields,
)
from qa_deepspeed.qa.data.read_report import Reason
from qa_deepspeed.qa.data.validation import Passage
from qa_deepspeed.utils.errors import UserError

if TYPE_CHECKING:
    import pyarrow

_PARQUET_ROWS_AT_ONCE = 1024
_CSV_FIELD_LIMIT = 2**31 - 1
_DELIMITERS = ",;\t|"


def flat_row(row: dict[str, Any], where: str, columns: ColumnNames) -> Passage:
    """The passage of a flat row, which holds one question."""
    context, fields = row_fields(row, columns)
    return Passage(where, context, [fields], numbered=False)


def not_squad(where: str) -> Passage:
    """What stands for a thing of unknown layout: one question that will be rejected."""
    return Passage(where, None, [None], numbered=False)


def csv_passages(path: str, columns: ColumnNames, encoding: str | None) -> Iterator[Passage]:
    """The rows of a CSV file; the delimiter is the one that gives its header the most columns."""
    # The limit belongs to the whole process; the default of 131,072 characters is too small for long contexts.
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    with open_text(path, encoding) as text:
        lines = _short_lines(text, path)
        before, header = next(((number, line) for number, line in enumerate(lines, 1) if line.strip()), (0, ""))
        if not header:
            raise UserError(f"{path}: the file is empty")
        delimiter = max(_DELIMITERS, key=lambda one: len(next(csv.reader([header], delimiter=one))))
        names = next(csv.reader([header], delimiter=delimiter, skipinitialspace=True))
        blanks = any(name != name.strip() for name in next(csv.reader([header], delimiter=delimiter)))
        names = [name.strip() for name in names]
        _require_columns(path, names, columns)
        reader = csv.DictReader(lines, names, delimiter=delimiter, strict=True, skipinitialspace=blanks)
        line = before + 1
        try:
            for row in reader:
                passage = flat_row(row, f"{path}: line {line}", columns)
                surplus = any(cell.strip() for cell in row.get(None) or ())
                yield passage._replace(fault=Reason.TOO_MANY_CELLS) if surplus else passage
                line = before + reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}: line {line} begins a row that is not CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: on line {line} or after: not UTF-8 text; {ENCODING_ADVICE}") from error


def parquet_passages(path: str, columns: ColumnNames) -> Iterator[Passage]:
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
            _require_columns(path, present, columns)
            wanted = [name for name in present if name in _used_columns(columns)]
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS_AT_ONCE, columns=wanted):
                for row in _python_rows(batch):
                    number += 1
                    where = f"{path}: row {number}"
                    yield not_squad(where) if row is None else flat_row(row, where, columns)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: not Parquet, or damaged: {reason}") from error


def _used_columns(columns: ColumnNames) -> set[str]:
    return {name for name in astuple(columns) if name} | {
        *CONTEXT_COLUMNS,
        *TEXT_COLUMNS,
        *START_COLUMNS,
        *SPAN_LISTS,
    }


def _require_columns(path: str, present: list[str], columns: ColumnNames) -> None:
    """Raises UserError for a table without a column of questions or contexts, or with one that is there twice."""
    used = _used_columns(columns)
    for name in present:
        if name in used and present.count(name) > 1:
            raise UserError(f"{path}: the column '{name}' occurs twice: rename or remove one")
    for field, names in (("question", (columns.question,)), ("context", (columns.context, *CONTEXT_COLUMNS))):
        if not any(name in present for name in names):
            raise UserError(
                f"{path}: no column '{names[0]}' for the {field} among {', '.join(present)}; name it with "
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
