"""Logits of teachers over the features of a store, cached beside them in half precision.

A folder for each teacher, named after a digest of features, weights and precision. Its files logits-N.arrow hold the
start and end logits of `PART_ROWS` features each, one after another: of a feature those of the null position and of its
context tokens, less the greatest one. A status (.json) is written after each, so that what is complete survives an
interruption; a file that does not match its status is computed again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from qa_deepspeed.qa.cache.entry import storage_error
from qa_deepspeed.qa.cache.manifest import FILE
from qa_deepspeed.qa.cache.waiting import Locks
from qa_deepspeed.qa.features.arrow import ArrowFile, CorruptFile, write_columns
from qa_deepspeed.qa.features.store import FeatureRows, FeatureStore
from qa_deepspeed.qa.features.windows import ranges, splits_of
from qa_deepspeed.utils.errors import StorageError
from qa_deepspeed.utils.files import write_bytes
from qa_deepspeed.utils.json_files import DamagedFile, read_json, sealed

FORMAT_VERSION = 1
"""Version of the files. Raise it with every change of what they hold."""

PART_ROWS = 1024
"""Features of one file: what an interruption loses at most."""

Log = Callable[[str], None]


def logits_key(features: str, weights: Sequence[str], precision: str) -> str:
    """64 hexadecimal digits that identify the logits of a teacher.

    Args:
        features: fingerprint of the features. weights: digests of the files of the model.
        precision: in which it computes.
    """
    content = {"format": FORMAT_VERSION, "features": features, "weights": sorted(weights), "precision": precision}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class LogitsCache:
    """The logits of one teacher over all features of a store."""

    def __init__(self, cache_dir: Path, key: str, store: FeatureStore, timeout_seconds: float = math.inf):
        """timeout_seconds: how long another run may leave the folder as it is while this one waits for it."""
        self.folder = cache_dir / f"teacher-{key[:24]}"
        self._store = store
        self._locks = Locks(self.folder, timeout_seconds)
        self._open: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    @property
    def parts(self) -> int:
        """Number of files."""
        return -(-len(self._store) // PART_ROWS)

    def rows(self, part: int) -> np.ndarray:
        """The features of a part, int64."""
        return np.arange(part * PART_ROWS, min(len(self._store), (part + 1) * PART_ROWS))

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """The number of positions that an answer can have in each of these features, int64 `[rows]`."""
        found: np.ndarray = self._store.windows(rows)[1] + 1
        return found

    def missing(self, log: Log | None = None) -> list[int]:
        """The parts that have to be computed. log: gets a line on each that is damaged."""
        found = []
        for part in range(self.parts):
            try:
                self._file(part)
            except CorruptFile as error:
                found.append(part)
                if log is not None and self._path(part, "json").exists():
                    log(f"{error}; computing it again")
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other run computes these logits; waits for one that does.

        Raises:
            LostRankError: it has made no progress for the timeout.
            StorageError: the folder cannot be written.
        """
        with ExitStack() as held:
            with self._errors_as_storage_errors():
                self.folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(self._locks.lock("logits"))
            yield

    def discard(self) -> None:
        """Forget all parts: they are computed again. Raises: StorageError."""
        with self._errors_as_storage_errors():
            for part in range(self.parts):
                self._path(part, "json").unlink(missing_ok=True)

    def write(self, part: int, start: np.ndarray, end: np.ndarray) -> None:
        """Write a part.

        Args:
            start, end: float16, the logits of its features one after another, `counts` of each.
        Raises:
            StorageError: the folder cannot be written.
        """
        assert start.dtype == end.dtype == np.float16 and len(start) == len(end) == self.counts(self.rows(part)).sum()
        with self._errors_as_storage_errors():
            status = write_columns(self._path(part, "arrow"), {"start": start, "end": end})
            write_bytes(self._path(part, "json"), json.dumps(sealed(status)).encode())

    def columns(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        """Start and end logits of a part, float16, as `write` takes them. Raises: StorageError if it is damaged."""
        return self._opened(part)[:2]

    def take(self, rows: np.ndarray, splits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Start and end logits of these features, float32 `[positions]`, in this order.

        Args:
            rows: int64 `[rows]`. splits: their boundaries `[rows + 1]` by `counts`.
        Raises:
            StorageError: a file is damaged.
        """
        start, end = np.empty((2, int(splits[-1])), np.float32)
        part_of_row = rows // PART_ROWS
        for part in np.unique(part_of_row).tolist():
            places = np.flatnonzero(part_of_row == part)
            starts, ends, begins = self._opened(part)
            counts = np.diff(splits)[places]
            target = ranges(splits[places], counts)
            source = ranges(begins[rows[places] - part * PART_ROWS], counts)
            start[target], end[target] = starts[source], ends[source]
        return start, end

    def _opened(self, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start and end logits of a part, mapped, and where those of each feature begin."""
        if part not in self._open:
            try:
                file = self._file(part)
            except CorruptFile as error:
                raise StorageError(f"{error}; start again, and it is computed again") from None
            begins = splits_of(self.counts(self.rows(part)))[:-1]
            self._open[part] = file.array("start"), file.array("end"), begins
        return self._open[part]

    def _file(self, part: int) -> ArrowFile:
        """A file as its status describes it. Raises: CorruptFile."""
        try:
            status = read_json(self._path(part, "json"), FILE, exact=True)
        except DamagedFile as error:
            raise CorruptFile(str(error)) from None
        path = self._path(part, "arrow")
        if status is None:
            raise CorruptFile(f"{path}: not complete")
        return ArrowFile(path, status["size"], status["checksum"])

    @contextmanager
    def _errors_as_storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise storage_error(self.folder, error) from error

    def _path(self, part: int, kind: str) -> Path:
        return self.folder / f"logits-{part:05d}.{kind}"


class SoftTargets:
    """What the teachers say of the rows of a store."""

    def __init__(self, store: FeatureStore, caches: Sequence[LogitsCache], temperature: float):
        """caches: of each teacher, complete."""
        self._store = store
        self._caches = caches
        self._temperature = temperature

    def take(self, rows: np.ndarray) -> FeatureRows:
        """As `FeatureStore.take`, with the mean over the teachers of their softened probabilities."""
        rows = np.asarray(rows, dtype=np.int64)
        found = self._store.take(rows)
        splits = splits_of(found.context_end - found.context_begin + 1)
        start, end = np.zeros((2, int(splits[-1])), np.float32)
        for cache in self._caches:
            of_start, of_end = cache.take(rows, splits)
            start += softened(of_start, splits, self._temperature)
            end += softened(of_end, splits, self._temperature)
        return dataclasses.replace(found, soft_start=start / len(self._caches), soft_end=end / len(self._caches))


def softened(logits: np.ndarray, splits: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / temperature) of each row, float32.

    Args:
        logits: float32 `[positions]`, the rows one after another, the greatest of each 0.
        splits: boundaries of the rows, int64 `[rows + 1]`; none is empty.
    """
    weights = np.exp(logits / np.float32(temperature))
    totals = np.add.reduceat(weights, splits[:-1])
    probabilities: np.ndarray = weights / np.repeat(totals, np.diff(splits))
    return probabilities
