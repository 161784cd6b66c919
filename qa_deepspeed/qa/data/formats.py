"""From files to passages: nested SQuAD JSON, and flat rows as JSON, JSON lines, CSV, TSV, Excel workbooks or Parquet;
each also compressed by gzip, bzip2 or xz.

Everything but a JSON document is read as a stream. A file that cannot be read is a `UserError` that names the place;
what stands in a question is not looked at here (`validation.py` does that).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qa_deepspeed.qa.data.files import (
    ENCODING_ADVICE,
    RECORD_LIMIT,
    LineSource,
    one_clear_error,
    open_lines,
    too_long,
    uncompressed_name,
)
from qa_deepspeed.qa.data.layouts import (
    ColumnNames,
    is_header,
    question_fields,
    rows_of_columns,
    split_for,
    splits_of,
)
from qa_deepspeed.qa.data.reasons import LAYOUTS
from qa_deepspeed.qa.data.tables import (
    QUESTIONS,
    csv_passages,
    excel_passages,
    flat_row,
    not_squad,
    parquet_passages,
)
from qa_deepspeed.qa.data.validation import Passage, Purpose, version_2_error
from qa_deepspeed.utils.errors import UserError

__all__ = ["ColumnNames", "read_passages"]


@dataclass(frozen=True)
class _Reading:
    """How a file is read, and the lines that say so."""

    columns: ColumnNames
    version_2_with_negative: bool
    purpose: Purpose
    notes: list[str]


def read_passages(
    path: str,
    columns: ColumnNames,
    version_2_with_negative: bool,
    encoding: str | None = None,
    *,
    purpose: Purpose = "evaluate",
    notes: list[str] | None = None,
    needed: tuple[str, ...] = QUESTIONS,
) -> Iterator[Passage]:
    """All passages of a file in its order; a flat row is a passage with one question, whose id may be None.

    The ending of the name says the format; one of a compression after it may be there or not.

    Args:
        encoding: of the text; None for UTF-8, or what a byte order mark says.
        purpose: which split is read of a file that holds several.
        notes: gets a line for each choice that was made, such as of a split or a sheet.
        needed: fields that a table must have a column for.
    Raises:
        UserError: the file is missing, truncated, not of its format, lacks a column, holds several splits none of which
            is for the purpose, or is SQuAD v2.0 data with unanswerable questions without `version_2_with_negative`.
    """
    name = uncompressed_name(path)
    notes = [] if notes is None else notes
    with one_clear_error(path):
        if name.endswith(".parquet"):
            yield from parquet_passages(path, columns, needed)
        elif name.endswith((".csv", ".tsv")):
            yield from csv_passages(path, columns, encoding, needed)
        elif name.endswith((".xlsx", ".xlsm")):
            yield from excel_passages(path, columns, notes, needed)
        else:
            yield from _json_passages(path, _Reading(columns, version_2_with_negative, purpose, notes), encoding)


def _decode(data: bytes, path: str, first_line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise UserError(
            f"{path}: line {line}, byte {column}: not UTF-8 text (byte 0x{data[error.start]:02x}); {ENCODING_ADVICE}"
        ) from error


def _parse(text: str, path: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        ends = " (the file ends there: it is truncated)" if not text[error.pos :].strip() else ""
        raise UserError(
            f"{path}: line {first_line + error.lineno - 1}, column {error.colno}: not JSON: {error.msg}{ends}; "
            f"{_JSON_ADVICE}"
        ) from error
    except ValueError as error:
        # A number of thousands of digits: Python refuses to convert it.
        raise UserError(f"{path}: line {first_line} or after: not JSON: {error}; {_JSON_ADVICE}") from error


_JSON_ADVICE = (
    "correct it there, get the file again, or let its name end in .csv, .tsv, .xlsx or .parquet if it is that"
)


def _json_passages(path: str, reading: _Reading, encoding: str | None) -> Iterator[Passage]:
    """Passages of one JSON document, or of JSON lines, distinguished by what follows the first line."""
    with open_lines(path, encoding) as data:
        number, first = _next_line(data, 0, path)
        if not first:
            raise UserError(f"{path}: the file is empty: write questions into it; read are {LAYOUTS}")
        next_number, following = _next_line(data, number, path)
        if following:
            try:
                value = json.loads(first)
            except ValueError:
                first = b"".join([first, b"\n" * (next_number - number - 1), following, data.read(RECORD_LIMIT + 1)])
                if len(first) > RECORD_LIMIT:
                    raise too_long(path, number) from None
            else:
                yield from _line_passages(value, path, number, reading)
                del value
                while following:
                    value = _parse(_decode(following, path, next_number), path, next_number)
                    yield from _line_passages(value, path, next_number, reading)
                    next_number, following = _next_line(data, next_number, path)
                return
    text = _decode(first, path, number)
    del first
    with _no_garbage_collection():
        document = _parse(text, path, number)
    del text
    yield from _document_passages(document, path, reading)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Python looks for cycles again and again while a document grows, which takes as long as parsing it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _next_line(data: LineSource, number: int, path: str) -> tuple[int, bytes]:
    """The next line that is not blank, and its number, the first being 1; an empty one at the end."""
    while line := data.readline(RECORD_LIMIT + 1):
        number += 1
        if len(line) > RECORD_LIMIT:
            raise too_long(path, number)
        if not line.isspace():
            return number, line
    return number, b""


def _line_passages(value: Any, path: str, number: int, reading: _Reading) -> Iterator[Passage]:
    where = f"{path}: line {number}"
    if isinstance(value, dict) and "data" in value:
        yield from _document_passages(value, where, reading)
    else:
        yield from _entry_passages(value, where, reading.columns)


def _document_passages(document: Any, path: str, reading: _Reading) -> Iterator[Passage]:
    columns = reading.columns
    if isinstance(document, dict) and (rows := rows_of_columns(document, columns)) is not None:
        entries, prefix = list(rows), "row"
    elif isinstance(document, dict) and "data" in document:
        version = str(document.get("version", "")).strip().lower().removeprefix("v")
        read_as_1 = version.split(".")[0] == "2" and not reading.version_2_with_negative
        if read_as_1 and _has_empty_answers(document["data"]):
            raise version_2_error(path)
        entries, prefix = document["data"], "data"
    elif isinstance(document, dict) and (names := splits_of(document)):
        entries, prefix = _split(document, names, path, reading)
    elif isinstance(document, dict):
        entries, prefix = [document], ""
    else:
        entries, prefix = document, ""
    if not isinstance(entries, list):
        raise UserError(f"{path}: not question-answering data: write it in a known layout: {LAYOUTS}")
    for index, entry in enumerate(entries):
        yield from _entry_passages(entry, f"{path}: {prefix}[{index}]", columns)


def _split(document: dict[str, Any], names: list[str], path: str, reading: _Reading) -> tuple[Any, str]:
    """The entries of the split for the purpose, and its name as the beginning of places."""
    name = split_for(reading.purpose, names)
    if name is None:
        raise UserError(
            f"{path}: holds the splits {', '.join(names)}, and which of them is to {reading.purpose} on is not clear: "
            "name one of them train, one validation, or write the one to read into a file of its own"
        )
    if len(names) > 1:
        reading.notes.append(f"holds the splits {', '.join(names)}: {name} is read to {reading.purpose} on")
    entries = document[name]
    return (entries["data"], f"{name}.data") if isinstance(entries, dict) else (entries, name)


def _has_empty_answers(articles: Any) -> bool:
    """Whether a question of SQuAD JSON has an empty list of answers. (The validator finds is_impossible.)"""
    entries = [one for one in articles if isinstance(one, dict)] if isinstance(articles, list) else []
    for level in ("paragraphs", "qas"):
        lists = [one.get(level) for one in entries]
        entries = [inner for found in lists if isinstance(found, list) for inner in found if isinstance(inner, dict)]
    return any(question.get("answers") == [] for question in entries)


def _entry_passages(entry: Any, where: str, columns: ColumnNames) -> Iterator[Passage]:
    """The passages of an article, or the one of a paragraph or a flat row."""
    if not isinstance(entry, dict):
        yield not_squad(where)
    elif is_header(entry):
        return
    elif "paragraphs" in entry:
        if not isinstance(entry["paragraphs"], list):
            yield not_squad(f"{where}.paragraphs")
            return
        for index, paragraph in enumerate(entry["paragraphs"]):
            yield _paragraph(paragraph, f"{where}.paragraphs[{index}]")
    elif "qas" in entry:
        yield _paragraph(entry, where)
    else:
        yield flat_row(entry, where, columns)


def _paragraph(paragraph: Any, where: str) -> Passage:
    if not isinstance(paragraph, dict) or not isinstance(paragraph.get("qas"), list):
        return not_squad(where)
    questions = [question_fields(fields) for fields in paragraph["qas"]]
    return Passage(where, paragraph.get("context"), questions, names=tuple(paragraph))
