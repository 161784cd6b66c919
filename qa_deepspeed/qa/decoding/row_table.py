"""A table on disk whose rows arrive in any order (numpy only)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qa_deepspeed.utils.files import mapped_array


class RowTable:
    """Named columns `[rows, ...]`, filled by row number.

    They lie in an unnamed file, which the system removes with the object, also when the process is killed.
    """

    def __init__(self, rows: int, columns: Mapping[str, tuple[str, tuple[int, ...]]], folder: Path):
        """columns: dtype and shape of one row's value, by name. folder: where the file is created.

        Raises:
            StorageError: the disk has no room for it.
        """
        dtype = np.dtype([(name, *column) for name, column in columns.items()])
        self._filled = np.zeros(rows, bool)
        self._records = mapped_array(folder, dtype, rows)

    def put(self, numbers: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Write these rows. Each row is written once."""
        assert not self._filled[numbers].any() and len(np.unique(numbers)) == len(numbers), "a row is written twice"
        self._filled[numbers] = True
        for name, column in values.items():
            self._records[name][numbers] = column

    def columns(self) -> dict[str, np.ndarray]:
        """All columns, mapped. Every row must have been written."""
        missing = np.flatnonzero(~self._filled)
        assert not len(missing), f"{len(missing)} rows were never written (first: {missing[:1]})"
        return {name: self._records[name] for name in self._records.dtype.names or ()}
