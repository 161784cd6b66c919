"""Waiting for other builders of a cache entry: reported after some seconds, given up after a timeout."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from qa_deepspeed.utils.errors import LostRankError
from qa_deepspeed.utils.locks import HOLDER_SUFFIX, Holder, file_times

NOTICE_SECONDS = 15.0
"""A wait without any change in the folder is reported after this long."""

SCAN_SECONDS = 1.0
"""The folder is looked at this often at most."""

POLL_SECONDS = 0.05
"""How often a lock is tried."""

log = logging.getLogger(__name__)


class Locks:
    """The locks of a folder, NAME.lock. The kernel releases those of a process that dies, not of one that is stopped.

    timeout_seconds: how long another process may hold a lock, or leave the folder as it is, while this one waits.
    """

    def __init__(self, folder: Path, timeout_seconds: float = math.inf) -> None:
        self._folder = folder
        self._timeout = timeout_seconds
        self._seen: dict[str, tuple[int, int]] = {}
        self._changed = self._scanned = time.monotonic()
        self._noticed = False

    @contextlib.contextmanager
    def try_lock(self, name: str) -> Iterator[bool]:
        """Whether this process got the lock; does not wait for it."""
        lock = filelock.FileLock(self._path(name))
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            yield False
            return
        holder = Holder(self._path(name))
        try:
            holder.note()
            yield True
        finally:
            holder.clear()
            lock.release()

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Wait for a lock.

        Raises:
            LostRankError: it was not released in time.
        """
        self.progress()
        while True:
            with self.try_lock(name) as locked:
                if locked:
                    yield
                    return
            self.wait()

    def progress(self) -> None:
        """Start the timeout again: this process has done something itself."""
        self._changed, self._noticed = time.monotonic(), False

    def wait(self) -> None:
        """Sleep for a moment.

        Raises:
            LostRankError: nothing in the folder has changed for the timeout.
        """
        now = time.monotonic()
        if now - self._scanned >= SCAN_SECONDS:
            self._scanned, seen = now, file_times(self._folder, leave_out=(".lock", HOLDER_SUFFIX))
            if seen != self._seen:
                self._seen = seen
                self.progress()
        unchanged = time.monotonic() - self._changed
        if unchanged > self._timeout:
            raise LostRankError(
                f"{self._folder}: no progress for {unchanged:.0f} s (--timeout), waiting for {self._held()}; if that "
                "process is stopped or hangs, end it and start again"
            )
        if unchanged > NOTICE_SECONDS and not self._noticed:
            self._noticed = True
            log.warning("waiting for %s: no progress for %.0f s in %s", self._held(), unchanged, self._folder)
        time.sleep(POLL_SECONDS)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.lock"

    def _held(self) -> str:
        """The locks that others hold, with their holders, in words."""
        held = []
        for path in sorted(self._folder.glob("*.lock")):
            holder = Holder(path).read()
            with self.try_lock(path.stem) as free:
                if not free:
                    held.append(f"{path.name} (held by {holder})")
        return ", ".join(held) or "another builder"
