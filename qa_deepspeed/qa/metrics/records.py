"""A few numbers per question, appended one question at a time and read back as arrays, in bounded memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from qa_deepspeed.utils.files import os_errors_as_user_errors

RECORDS_IN_MEMORY = 8192
"""Records held as Python values; further ones go into an unnamed file, which is memory-mapped for reading."""

RECORDS_AT_ONCE = 65536


class QuestionRecords:
    """Records of one dtype, in the order of appending."""

    def __init__(self, dtype: np.dtype, folder: Path | None = None):
        """folder: where the file is created; None for the system's temporary folder."""
        self._dtype = dtype
        self._place = folder or Path(tempfile.gettempdir())
        self._waiting: list[tuple[Any, ...]] = []
        self._file: IO[bytes] | None = None
        self._written = 0

    def __len__(self) -> int:
        return self._written + len(self._waiting)

    def append(self, record: tuple[Any, ...]) -> None:
        """Add one record: a value for each field of the dtype."""
        self._waiting.append(record)
        if len(self._waiting) == RECORDS_IN_MEMORY:
            with os_errors_as_user_errors(self._place):
                if self._file is None:
                    # Unbuffered: what could not be written is not tried again when the file is closed.
                    self._file = tempfile.TemporaryFile(dir=self._place, buffering=0)  # noqa: SIM115 (as the records)
                self._write(np.array(self._waiting, self._dtype))
            self._written += len(self._waiting)
            self._waiting.clear()

    def columns(self) -> np.ndarray:
        """All records, `[questions]` with the dtype's fields; memory-mapped if there is a file."""
        waiting = np.array(self._waiting, self._dtype)
        if self._file is None:
            return waiting
        with os_errors_as_user_errors(self._place):
            self._write(waiting)  # the next batch of records overwrites them
            return np.memmap(self._file, self._dtype, "r", shape=(len(self),))

    def _write(self, records: np.ndarray) -> None:
        """Write behind the records that are in the file for good; a mapping must not reach beyond what is written."""
        assert self._file is not None, "the file is open"
        self._file.seek(self._written * self._dtype.itemsize)  # a reading leaves the file at its end
        block = memoryview(records.tobytes())
        while block:
            block = block[self._file.write(block) :]

    def chunks(self) -> Iterator[np.ndarray]:
        """The records, RECORDS_AT_ONCE at a time."""
        columns = self.columns()
        for begin in range(0, len(columns), RECORDS_AT_ONCE):
            yield columns[begin : begin + RECORDS_AT_ONCE]
