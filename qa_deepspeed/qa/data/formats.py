"""From files to passages: nested SQuAD JSON, and flat rows as JSON, JSON lines, CSV, TSV or Parquet; each also gzipped.

Everything but a JSON document is read as a stream. A file that cannot be read is a `UserError` that names the place;
what stands in a question is not looked at here (`validation.py` does that).
"""

from __future__ import annotations

import csv
import gc
import gzip
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from qa_deepspeed.qa.data.validation import Passage, version_2_error
from qa_deepspeed.utils.errors import UserError

if TYPE_CHECKING:
    import pyarrow

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PARQUET_ROWS_AT_ONCE = 1024
_CSV_FIELD_LIMIT = 2**31 - 1
RECORD_LIMIT = 2 * 2**30
"""Bytes of the longest line or JSON document that is read into memory; a compressed file can hold far longer ones."""


@dataclass(frozen=True)
class ColumnNames:
    """What the columns of flat rows are called. Nested SQuAD JSON always has its own names."""

    id: str = "id"
    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    is_impossible: str = "is_impossible"


def read_passages(
    path: str, columns: ColumnNames, version_2_with_negative: bool, ids_required: bool = True
) -> Iterator[Passage]:
    """All passages of a file in its order; a flat row is a passage with one question.

    The ending of the name says the format; `.gz` after it may be there or not. A table without a column of ids is
    read where `ids_required` is false; its questions have None.

    Raises:
        UserError: the file is missing, truncated, not of its format, lacks a column, or is SQuAD v2.0 data with
            unanswerable questions without `version_2_with_negative`.
    """
    name = path.lower().removesuffix(".gz")
    with _one_clear_error(path):
        if name.endswith(".parquet"):
            yield from _parquet_passages(path, columns, ids_required)
        elif name.endswith((".csv", ".tsv")):
            yield from _csv_passages(path, columns, "\t" if name.endswith(".tsv") else ",", ids_required)
        else:
            yield from _json_passages(path, columns, version_2_with_negative)


@contextmanager
def _one_clear_error(path: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x}); convert the file") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the gzip data are truncated or damaged ({error}); get the file again") from error
    except RecursionError as error:
        raise UserError(f"{path}: JSON nested too deeply to be question-answering data") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


@contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked if they begin as gzip does, without a byte order mark."""
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        data: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        if data.read(3) != _BYTE_ORDER_MARK:
            data.seek(0)
        yield data


def _decode(data: bytes, path: str, first_line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise UserError(
            f"{path}: line {line}, byte {column}: not UTF-8 text (byte 0x{data[error.start]:02x}); convert the file"
        ) from error


def _parse(text: str, path: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        ends = " (the file ends there: it is truncated)" if not text[error.pos :].strip() else ""
        raise UserError(
            f"{path}: line {first_line + error.lineno - 1}, column {error.colno}: not JSON: {error.msg}{ends}"
        ) from error
    except ValueError as error:
        # A number of thousands of digits: Python refuses to convert it.
        raise UserError(f"{path}: line {first_line} or after: not JSON: {error}") from error


def _json_passages(path: str, columns: ColumnNames, version_2_with_negative: bool) -> Iterator[Passage]:
    """Passages of one JSON document, or of JSON lines, distinguished by what follows the first line."""
    with _open(path) as data:
        number, first = _next_line(data, 0, path)
        if not first:
            raise UserError(f"{path}: the file is empty")
        next_number, following = _next_line(data, number, path)
        if following:
            try:
                value = json.loads(first)
            except ValueError:
                first = b"".join([first, b"\n" * (next_number - number - 1), following, data.read(RECORD_LIMIT + 1)])
                if len(first) > RECORD_LIMIT:
                    raise _too_long(path, number) from None
            else:
                yield from _line_passages(value, path, number, columns, version_2_with_negative)
                del value
                while following:
                    value = _parse(_decode(following, path, next_number), path, next_number)
                    yield from _line_passages(value, path, next_number, columns, version_2_with_negative)
                    next_number, following = _next_line(data, next_number, path)
                return
    text = _decode(first, path, number)
    del first
    with _no_garbage_collection():
        document = _parse(text, path, number)
    del text
    yield from _document_passages(document, path, columns, version_2_with_negative)


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


def _next_line(data: BinaryIO, number: int, path: str) -> tuple[int, bytes]:
    """The next line that is not blank, and its number, the first being 1; an empty one at the end."""
    while line := data.readline(RECORD_LIMIT + 1):
        number += 1
        if len(line) > RECORD_LIMIT:
            raise _too_long(path, number)
        if not line.isspace():
            return number, line
    return number, b""


def _too_long(path: str, line: int) -> UserError:
    return UserError(
        f"{path}: line {line}: more than {RECORD_LIMIT // 2**30} GiB in one line or document; write "
        "one question a line (JSON lines)"
    )


def _line_passages(
    value: Any, path: str, number: int, columns: ColumnNames, version_2_with_negative: bool
) -> Iterator[Passage]:
    where = f"{path}: line {number}"
    if isinstance(value, dict) and "data" in value:
        yield from _document_passages(value, where, columns, version_2_with_negative)
    else:
        yield from _entry_passages(value, where, columns)


def _document_passages(
    document: Any, path: str, columns: ColumnNames, version_2_with_negative: bool
) -> Iterator[Passage]:
    if isinstance(document, dict) and "data" in document:
        version = str(document.get("version", "")).strip().lower().removeprefix("v")
        if version.split(".")[0] == "2" and not version_2_with_negative and _has_empty_answers(document["data"]):
            raise version_2_error(path)
        entries, prefix = document["data"], "data"
    elif isinstance(document, dict):
        entries, prefix = [document], ""
    else:
        entries, prefix = document, ""
    if not isinstance(entries, list):
        raise UserError(f"{path}: not question-answering data: SQuAD JSON has a list of articles under 'data'")
    for index, entry in enumerate(entries):
        yield from _entry_passages(entry, f"{path}: {prefix}[{index}]", columns)


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
        yield _not_squad(where)
    elif "paragraphs" in entry:
        if not isinstance(entry["paragraphs"], list):
            yield _not_squad(f"{where}.paragraphs")
            return
        for index, paragraph in enumerate(entry["paragraphs"]):
            yield _paragraph(paragraph, f"{where}.paragraphs[{index}]")
    elif "qas" in entry:
        yield _paragraph(entry, where)
    else:
        yield _flat_row(entry, where, columns)


def _paragraph(paragraph: Any, where: str) -> Passage:
    if not isinstance(paragraph, dict) or not isinstance(paragraph.get("qas"), list):
        return _not_squad(where)
    return Passage(where, paragraph.get("context"), paragraph["qas"])


def _not_squad(where: str) -> Passage:
    """What stands for a thing of unknown layout: one question that will be rejected."""
    return Passage(where, None, [None], numbered=False)


def _flat_row(row: dict[str, Any], where: str, columns: ColumnNames) -> Passage:
    fields = {
        "id": row.get(columns.id),
        "question": row.get(columns.question),
        "answers": row.get(columns.answers),
        "is_impossible": row.get(columns.is_impossible),
    }
    return Passage(where, row.get(columns.context), [fields], numbered=False)


def _require_columns(path: str, present: list[str], columns: ColumnNames, ids_required: bool) -> None:
    for field, name in zip(("id", "question", "context"), astuple(columns)[:3], strict=True):
        if name not in present and (ids_required or field != "id"):
            raise UserError(
                f"{path}: no column '{name}' for the {field} among {', '.join(present)}; name it with --{field}_column"
            )


def _csv_passages(path: str, columns: ColumnNames, delimiter: str, ids_required: bool) -> Iterator[Passage]:
    # The limit belongs to the whole process; the default of 131,072 characters is too small for long contexts.
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    with _open(path) as data, io.TextIOWrapper(data, encoding="utf-8", newline="") as text:
        reader = csv.DictReader(_short_lines(text, path), delimiter=delimiter, strict=True)
        line = 1
        try:
            if not reader.fieldnames:
                raise UserError(f"{path}: the file is empty")
            _require_columns(path, list(reader.fieldnames), columns, ids_required)
            line = reader.line_num + 1
            for row in reader:
                yield _flat_row(row, f"{path}: line {line}", columns)
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}: line {line} begins a row that is not CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: on line {line} or after: not UTF-8 text; convert the file") from error


def _short_lines(text: io.TextIOWrapper, path: str) -> Iterator[str]:
    number = 0
    while line := text.readline(RECORD_LIMIT + 1):
        number += 1
        if len(line) > RECORD_LIMIT:
            raise _too_long(path, number)
        yield line


def _parquet_passages(path: str, columns: ColumnNames, ids_required: bool) -> Iterator[Passage]:
    import pyarrow
    import pyarrow.parquet

    with _open(path) as data, tempfile.TemporaryFile() as unpacked:
        if isinstance(data, gzip.GzipFile):
            # Parquet is read from its end; unpacking to disk once keeps that cheap and the memory flat.
            shutil.copyfileobj(data, unpacked)
        source = unpacked if isinstance(data, gzip.GzipFile) else data
        try:
            table = pyarrow.parquet.ParquetFile(source)
            present = table.schema_arrow.names
            _require_columns(path, present, columns, ids_required)
            wanted = [name for name in astuple(columns) if name in present]
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS_AT_ONCE, columns=wanted):
                for row in _python_rows(batch):
                    number += 1
                    where = f"{path}: row {number}"
                    yield _not_squad(where) if row is None else _flat_row(row, where, columns)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: not Parquet, or damaged: {reason}") from error


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
