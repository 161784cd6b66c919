"""Progress of whatever takes more than two seconds: a bar on terminals, a line now and then in files."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

QUIET_SECONDS = 2.0
"""What is over sooner is not worth a bar."""

LINE_SECONDS = 30.0
"""Seconds between two lines where there is no terminal."""


class Progress:
    """Counts work done and tells rate and time left on the standard error stream. Use it as a context manager."""

    def __init__(self, what: str, total: int | None, unit: str, shown: bool = True, lines: bool = True) -> None:
        """what: the stage, such as "answering"; total: units of the whole, if known; shown: false to tell nothing;
        lines: false to tell nothing where there is no terminal.
        """
        terminal = sys.stderr.isatty()
        self._bar = tqdm(desc=what, total=total, unit=unit, delay=QUIET_SECONDS, disable=not (shown and terminal))
        self._lines = shown and lines and not terminal
        self._what, self._total, self._unit = what, total, unit
        self._began = self._told = time.monotonic()
        self._done = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, units: int = 1) -> None:
        """Count units that are done."""
        self._done += units
        self._bar.update(units)
        now = time.monotonic()
        if self._lines and now - self._told >= LINE_SECONDS:
            self._told = now
            print(self._line(now - self._began), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        rate = self._done / seconds
        if self._total is None:
            return f"{self._what}: {self._done:,} {self._unit}s, {rate:.1f}/s"
        left = int((self._total - self._done) / rate)
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        return f"{self._what}: {self._done:,} of {self._total:,} {self._unit}s, {rate:.1f}/s, {clock} left"
