"""Rows that arrive in any order, a few at a time, in an unnamed file: memory does not grow with their number."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


class RowTable:
    """Named columns `[rows, ...]`, filled by row number. The file goes away with the object, also when killed."""

    def __init__(self, rows: int, columns: Mapping[str, tuple[str, tuple[int, ...]]], folder: Path):
        """columns: dtype and shape of one row's value, by name. folder: on whose disk the file lies."""
        dtype = np.dtype([(name, *column) for name, column in columns.items()])
        self._there = np.zeros(rows, bool)
        self._records = np.zeros(0, dtype)
        if rows:
            with tempfile.TemporaryFile(dir=folder) as file:
                self._records = np.memmap(file, dtype, "w+", shape=(rows,))

    def put(self, numbers: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Write these rows. Each may come once."""
        assert not self._there[numbers].any() and len(np.unique(numbers)) == len(numbers), "a row came twice"
        self._there[numbers] = True
        for name, column in values.items():
            self._records[name][numbers] = column

    def columns(self) -> dict[str, np.ndarray]:
        """All columns, mapped. Every row must have come."""
        missing = np.flatnonzero(~self._there)
        assert not len(missing), f"{len(missing)} rows never came (first: {missing[:1]})"
        return {name: self._records[name] for name in self._records.dtype.names or ()}
