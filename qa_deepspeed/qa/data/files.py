"""Data files: weights behind their names, names that tell them apart; compression, encoding, what is no data file."""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import io
import lzma
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

from qa_deepspeed.utils.errors import UserError

RECORD_LIMIT = 2 * 2**30
"""Bytes of the longest line or JSON document that is read into memory; a compressed file can hold far longer ones."""

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Marks at the beginning of a file, longer ones before those that they begin with."""

_COMPRESSIONS: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
"""How files of each compression begin, and what unpacks them."""

_OTHER_FILES = {
    b"PK\x03\x04": "a zip archive or an Excel workbook: unpack it; a workbook is read if its name ends in .xlsx",
    b"ARROW1": "an Arrow file: write it as Parquet or JSON lines (Dataset.to_parquet, to_json)",
    b"\xff\xff\xff\xff": "an Arrow stream: write it as Parquet or JSON lines (Dataset.to_parquet, to_json)",
    b"\x80\x04\x95": "a pickle, which could run any program and is never read: write it as JSON lines",
    b"\x80\x05\x95": "a pickle, which could run any program and is never read: write it as JSON lines",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard: unpack it, or compress it by gzip, bzip2 or xz",
    b"SQLite format 3": "an SQLite database: write the table as CSV",
    b"%PDF": "a PDF file: write its text and the questions as rows of a CSV file",
}
"""How files begin that hold no rows to read here, and what to do."""


def uncompressed_name(path: str) -> str:
    """The name in lower case without the ending of a compression."""
    name = path.lower()
    for ending in (".gz", ".bz2", ".xz"):
        name = name.removesuffix(ending)
    return name


@contextmanager
def one_clear_error(path: str) -> Iterator[None]:
    """Inside, what goes wrong with reading `path` becomes a UserError of one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not {error.encoding.upper()} text (byte 0x{error.object[error.start]:02x}); {ENCODING_ADVICE}"
        ) from error
    except UnicodeError as error:
        raise UserError(f"{path}: not text of this encoding ({error}); {ENCODING_ADVICE}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise UserError(
            f"{path}: the compressed data are truncated or damaged ({error}); get the file again"
        ) from error
    except RecursionError as error:
        raise UserError(
            f"{path}: JSON nested too deeply to be question-answering data: write it as SQuAD JSON or JSON lines"
        ) from error
    except IsADirectoryError as error:
        raise UserError(
            f"{path}: a folder, not a file: name a file in it; of a data set that save_to_disk wrote, write Parquet "
            "(Dataset.to_parquet)"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}): check the path and your permissions"
        ) from error


ENCODING_ADVICE = "convert the file, or name its encoding: --encoding cp1252, say"


class LineSource(Protocol):
    """What JSON is read from: bytes of UTF-8."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes (characters, where they are recoded)."""

    def readline(self, size: int, /) -> bytes:
        """A line, or the first `size` bytes of it."""


class _Recoded:
    """Text of any encoding as bytes of UTF-8."""

    def __init__(self, text: TextIO) -> None:
        self._text = text

    def read(self, size: int) -> bytes:
        return self._text.read(size).encode("utf-8", "surrogatepass")

    def readline(self, size: int) -> bytes:
        return self._text.readline(size).encode("utf-8", "surrogatepass")


@contextmanager
def open_binary(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked."""
    with open(path, "rb") as raw:
        begin = raw.read(16)
        raw.seek(0)
        unpack = next((unpack for magic, unpack in _COMPRESSIONS.items() if begin.startswith(magic)), None)
        yield raw if unpack is None else unpack(raw)


@contextmanager
def open_lines(path: str, encoding: str | None) -> Iterator[LineSource]:
    """A file as bytes of UTF-8, unpacked, without a byte order mark.

    Raises:
        UserError: as `open_text`.
    """
    with open_binary(path) as data:
        encoding, mark = _encoding_of(data, path, encoding)
        data.seek(mark)
        if encoding == "utf-8":
            yield data
        else:
            yield _Recoded(io.TextIOWrapper(data, encoding=encoding))


@contextmanager
def open_text(path: str, encoding: str | None) -> Iterator[TextIO]:
    """The text of a file, unpacked, without a byte order mark, line ends as they are.

    Args:
        encoding: None for UTF-8, or what the byte order mark says.
    Raises:
        UserError: the file is of a kind that is not read, or the encoding is unknown.
    """
    with open_binary(path) as data:
        encoding, mark = _encoding_of(data, path, encoding)
        data.seek(mark)
        yield io.TextIOWrapper(data, encoding=encoding, newline="")


def _encoding_of(data: BinaryIO, path: str, encoding: str | None) -> tuple[str, int]:
    """The encoding of a file, and the length of a mark at its beginning that the encoding does not remove itself."""
    begin = data.read(16)
    data.seek(0)
    what = next((what for magic, what in _OTHER_FILES.items() if begin.startswith(magic)), None)
    if what is not None:
        raise UserError(f"{path}: {what}")
    if encoding is not None:
        try:
            io.TextIOWrapper(io.BytesIO(), encoding=encoding)
            mark = "\ufeff".encode(encoding)
        except UnicodeError:  # an encoding without this character
            return encoding, 0
        except (LookupError, ValueError):
            raise UserError(f"encoding {encoding} is unknown: pass a name such as cp1252, latin-1 or utf-16") from None
        return encoding, len(mark) if begin.startswith(mark) else 0
    if begin.startswith(codecs.BOM_UTF8):
        return "utf-8", len(codecs.BOM_UTF8)
    return next((name for mark, name in _BYTE_ORDER_MARKS.items() if begin.startswith(mark)), "utf-8"), 0


def line_of_bad_byte(path: str, encoding: str) -> int:
    """The first line with a byte that the encoding does not know; 0 for encodings whose line ends are not one byte."""
    if "\n".encode(encoding) != b"\n":
        return 0
    with open_binary(path) as data:
        for number, line in enumerate(iter(lambda: data.readline(RECORD_LIMIT), b""), 1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                return number
    return 0


def too_long(path: str, line: int) -> UserError:
    """The error for a line or document over `RECORD_LIMIT`."""
    return UserError(
        f"{path}: line {line}: more than {RECORD_LIMIT // 2**30} GiB in one line or document; write "
        "one question a line (JSON lines)"
    )


def split_weight(text: str) -> tuple[str, float]:
    """Path or glob pattern, and weight, of `squad.json=2`; the weight is 1 where none is given.

    A path that exists, or a pattern that matches files, has no weight: a file name may hold `=`.

    Raises:
        UserError: the weight is not a finite number above 0.
    """
    path, equals, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    whole = os.path.expanduser(text)
    if not equals or os.path.exists(whole) or glob.glob(whole, recursive=True):
        return text, 1.0
    if not 0 < weight < math.inf:
        raise UserError(f"{text}: the weight of a file must be a number above 0, not {number}: write {path}=2, say")
    return path, weight


def distinct_names(paths: Sequence[str]) -> list[str]:
    """The last component of each path, after as many of its folders as tell it apart from the others: `squad/dev.json`.

    A path that is given twice has the same name twice.
    """
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    lengths = [1] * len(parts)
    while True:
        ends = [part[-length:] for part, length in zip(parts, lengths, strict=True)]
        counts = Counter(ends)
        longer = [
            length + 1 if counts[end] > 1 and length < len(part) else length
            for part, length, end in zip(parts, lengths, ends, strict=True)
        ]
        if longer == lengths:
            return [os.path.join(*end) for end in ends]
        lengths = longer
