"""Small Arrow files of named arrays: written under a temporary name and renamed, read memory-mapped, checked by sum.

A file holds one record batch of one row; each column is one list, so that arrays of different lengths share a file and
come back as zero-copy views of the map.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from qa_deepspeed.utils.errors import UserError

Column = np.ndarray | Sequence[str]


class CorruptFile(Exception):
    """A file of the cache that is missing, cut off, or not what was written."""


def write_columns(path: Path, columns: Mapping[str, Column]) -> dict[str, int | str]:
    """Write arrays and lists of strings; returns the size and checksum to keep for `check`.

    Raises: UserError if the disk is full or the folder cannot be written; nothing is left behind then.
    """
    values = [numbers(column) if isinstance(column, np.ndarray) else _strings(column) for column in columns.values()]
    lists = [
        pa.LargeListArray.from_arrays(numbers(np.array([0, len(value)], dtype=np.int64)), value) for value in values
    ]
    batch = pa.record_batch(lists, names=list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data = sink.getvalue()
    write_atomically(path, data)
    return {"size": data.size, "checksum": xxhash.xxh3_128_hexdigest(data)}


def numbers(column: np.ndarray) -> pa.Array:
    """An Arrow array of a numpy array, without `pa.array`, whose first call imports pandas: more than half a second."""
    contiguous = np.ascontiguousarray(column)
    return pa.Array.from_buffers(pa.from_numpy_dtype(column.dtype), len(column), [None, pa.py_buffer(contiguous)])


def _strings(column: Sequence[str]) -> pa.Array:
    encoded = [text.encode() for text in column]
    places = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(one) for one in encoded], out=places[1:])
    return pa.Array.from_buffers(
        pa.large_string(), len(encoded), [None, pa.py_buffer(places), pa.py_buffer(b"".join(encoded))]
    )


def write_atomically(path: Path, data: bytes | pa.Buffer) -> None:
    """Put `data` at `path`, whole or not at all: a temporary name beside it, then a rename.

    Raises: UserError if it cannot be written.
    """
    # No fsync: what a power cut leaves half-written fails its size or checksum when it is read, and is made again.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise storage_error(path, error) from error


def storage_error(path: Path, error: OSError) -> UserError:
    """The one line about a folder that cannot hold the cache."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"{path.parent}: the disk is full; free some space or choose another folder with --cache_dir")
    return UserError(
        f"{path.parent}: cannot write the feature cache ({error.strerror}); choose another folder with --cache_dir"
    )


def check_size(path: Path, size: int) -> None:
    """Raises CorruptFile unless `path` has this many bytes."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise CorruptFile(f"{path}: {error.strerror}") from error
    if found != size:
        raise CorruptFile(f"{path}: {found} bytes, not {size}")


class Columns:
    """The columns of one file, memory-mapped. Raises CorruptFile unless size and checksum are as expected."""

    def __init__(self, path: Path, size: int, checksum: str):
        check_size(path, size)
        try:
            with pa.memory_map(str(path)) as source:
                data = source.read_buffer()
            if xxhash.xxh3_128_hexdigest(data) != checksum:
                raise CorruptFile(f"{path}: its checksum is not {checksum}")
            self._batch = pa.ipc.open_file(pa.BufferReader(data)).get_batch(0)
        except (OSError, pa.ArrowInvalid) as error:
            raise CorruptFile(f"{path}: {error}") from error

    def array(self, name: str) -> np.ndarray:
        """A numeric column, as a read-only view."""
        values = self._batch.column(name).values
        kind = np.dtype(values.type.to_pandas_dtype())
        return np.frombuffer(values.buffers()[1], kind, len(values), values.offset * kind.itemsize)

    def strings(self, name: str) -> pa.LargeStringArray:
        """A column of strings; `.to_pylist()` or `[i].as_py()` decodes them."""
        return self._batch.column(name).values
