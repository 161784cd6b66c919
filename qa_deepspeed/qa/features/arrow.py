"""Arrow files of named columns: written under a temporary name and renamed, memory-mapped, verified by checksum.

A file holds one record batch of one row; each column is one list, so that columns of different lengths share a file
and are zero-copy views of the map.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import xxhash

from qa_deepspeed.utils.files import write_bytes

Column = np.ndarray | Sequence[str]


class CorruptFile(Exception):
    """A cache file is missing, truncated, or does not hold what was written."""


class ColumnTable(Protocol):
    """Named columns, in a file or in memory."""

    def array(self, name: str) -> np.ndarray:
        """A numeric column."""

    def strings(self, name: str) -> pa.LargeStringArray:
        """A column of strings; `.to_pylist()` or `[i].as_py()` decodes them."""


def write_columns(path: Path, columns: Mapping[str, Column]) -> dict[str, int | str]:
    """Write numeric and string columns; returns the `size` and `checksum` that `ArrowFile` verifies.

    Raises: OSError if the file cannot be written; nothing is left behind then.
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
    # A power cut may truncate the file (no fsync): then size or checksum do not match, and it is built again.
    write_bytes(path, data)
    return {"size": data.size, "checksum": xxhash.xxh3_128_hexdigest(data)}


def numbers(column: np.ndarray) -> pa.Array:
    """An Arrow array of a numpy array. Not by `pa.array`, whose first call imports pandas in over half a second."""
    contiguous = np.ascontiguousarray(column)
    return pa.Array.from_buffers(pa.from_numpy_dtype(column.dtype), len(column), [None, pa.py_buffer(contiguous)])


def _strings(column: Sequence[str]) -> pa.Array:
    encoded = [text.encode() for text in column]
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(one) for one in encoded], out=offsets[1:])
    return pa.Array.from_buffers(
        pa.large_string(), len(encoded), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    )


def check_size(path: Path, size: int) -> None:
    """Raises CorruptFile unless `path` has this many bytes."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise CorruptFile(f"{path}: {error.strerror}") from error
    if found != size:
        raise CorruptFile(f"{path}: {found} bytes instead of {size}")


class ArrowFile:
    """The columns of one file, memory-mapped. Raises CorruptFile unless size and checksum match."""

    def __init__(self, path: Path, size: int, checksum: str):
        check_size(path, size)
        try:
            with pa.memory_map(os.fsencode(path)) as source:
                data = source.read_buffer()
            if xxhash.xxh3_128_hexdigest(data) != checksum:
                raise CorruptFile(f"{path}: its checksum is not {checksum}")
            self._batch = pa.ipc.open_file(pa.BufferReader(data)).get_batch(0)
        except (OSError, pa.ArrowInvalid) as error:
            raise CorruptFile(f"{path}: {error}") from error

    def array(self, name: str) -> np.ndarray:
        """A numeric column, as a read-only view."""
        values = self._batch.column(name).values
        dtype = np.dtype(values.type.to_pandas_dtype())
        return np.frombuffer(values.buffers()[1], dtype, len(values), values.offset * dtype.itemsize)

    def strings(self, name: str) -> pa.LargeStringArray:
        """A column of strings; `.to_pylist()` or `[i].as_py()` decodes them."""
        return self._batch.column(name).values
