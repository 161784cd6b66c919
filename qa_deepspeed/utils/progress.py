"""Progress of stages that take more than two seconds: a bar on terminals, a line every half minute in files."""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

QUIET_SECONDS = 2.0
"""Stages that end sooner get no bar."""

LINE_SECONDS = 30.0
"""Seconds between two lines where there is no terminal."""


class ProgressBar:
    """Counts finished units and shows rate and ETA on the standard error stream. Use it as a context manager.

    It is thread-safe.
    """

    def __init__(
        self, what: str, total: int | None, unit: str, shown: bool = True, lines: bool = True, done: int = 0
    ) -> None:
        """what: the stage, such as "answering"; total: number of units, if known; shown: false for no output; lines:
        false for no output without a terminal; done: units finished before.
        """
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc=what,
            total=total,
            unit=unit,
            initial=done,
            delay=QUIET_SECONDS,
            dynamic_ncols=True,
            unit_scale=total is not None and total >= 10_000,
            disable=not (shown and terminal),
        )
        self._lines = shown and lines and not terminal
        self._what, self._total, self._unit = what, total, unit
        self._began = self._last_line = time.monotonic()
        self._before = self._done = done
        self._lock = threading.RLock()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the bar as it is; for use without a context manager."""
        self._bar.close()

    def advance(self, units: int = 1) -> None:
        """Count finished units."""
        with self._lock:
            self.reach(self._done + units)

    def reach(self, done: int, total: int | None = None) -> None:
        """Set the number of finished units, and of all once it is known."""
        with self._lock:
            if total is not None and total != self._total:
                self._total = self._bar.total = total
            self._bar.update(done - self._done)
            self._done = done
            now = time.monotonic()
            if self._lines and now - self._last_line >= LINE_SECONDS:
                self._last_line = now
                with suppress(OSError):  # a full disk under the log does not end the work
                    print(self._line(now - self._began), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        rate = (self._done - self._before) / seconds
        of = "" if self._total is None else f" of {self._total:,}"
        left = "" if self._total is None or not rate else f", {clock((self._total - self._done) / rate)} left"
        return f"{self._what}: {self._done:,}{of} {self._unit}s, {rate:.1f}/s{left}"


def clock(seconds: float) -> str:
    """Seconds as text such as 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


MEGABYTE = 10**6

LOOK_SECONDS = 0.5
"""Seconds between two measurements of growing files."""

BLOCK_BYTES = 512
"""Unit of `st_blocks` on any disk."""


def hash_progress(what: str, paths: Iterable[Path], shown: bool = True) -> ProgressBar:
    """A bar over the megabytes of these files, which `sha256_of` advances."""
    return ProgressBar(what, sum(_megabytes(path.stat().st_size) for path in paths), "megabyte", shown)


def sha256_of(path: Path, bar: ProgressBar) -> str:
    """The hexadecimal SHA-256 of a file, read a megabyte at a time; a last part counts as one."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(MEGABYTE):
            digest.update(block)
            bar.advance()
    return digest.hexdigest()


@contextmanager
def write_progress(what: str, folder: Path, size: int) -> Iterator[None]:
    """Show progress while the body writes `size` bytes into `folder` by code that reports none."""
    whole, over = _megabytes(size), threading.Event()

    def follow() -> None:
        while not over.wait(LOOK_SECONDS):
            with suppress(OSError):  # a file was renamed meanwhile
                bar.reach(min(_written(folder) // MEGABYTE, whole))

    with ProgressBar(what, whole, "megabyte") as bar:
        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield
        finally:
            over.set()
            follower.join()
        bar.reach(whole)


def _written(folder: Path) -> int:
    """Bytes that the folder's files take on the disk: their lengths are often set before they are written."""
    return sum(path.stat().st_blocks * BLOCK_BYTES for path in folder.rglob("*") if path.is_file())


def _megabytes(size: int) -> int:
    return -(-size // MEGABYTE)
