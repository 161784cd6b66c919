"""Lock of an output folder: one run at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.locks import Holder

LOCK_FILE = ".lock"

PATIENCE_SECONDS = 10.0
"""Seconds that a killed run may take to release its lock."""


def user_of(output_dir: Path) -> str | None:
    """Who runs in `output_dir` now, as `process N on HOST`; None if no other process does."""
    try:
        handle = os.open(output_dir / LOCK_FILE, os.O_RDWR)
    except OSError:  # none has run there, or the run itself says what is wrong
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released below: a run that starts now tries again
    except OSError as error:
        return Holder(output_dir / LOCK_FILE).read() if error.errno in (errno.EACCES, errno.EAGAIN) else None
    finally:
        os.close(handle)
    return None


class RunLock:
    """Locks `output_dir` for this process until `release`; the operating system releases it when the process ends.

    It is a record lock (lockf): forked processes do not inherit it, and it works on NFS.

    Raises:
        UserError: another running process holds the lock.
    """

    def __init__(self, output_dir: Path, patience: float = PATIENCE_SECONDS) -> None:
        self._path = output_dir / LOCK_FILE
        self._handle = self._open()
        self._holder = Holder(output_dir / LOCK_FILE)
        deadline = time.monotonic() + patience
        while not self._take(output_dir):
            if time.monotonic() > deadline:
                os.close(self._handle)
                raise UserError(
                    f"another run is using {output_dir} ({self._holder.read()}): wait until it ends, or pass another "
                    "--output_dir"
                )
            time.sleep(0.2)
        self._holder.note()

    def _open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)

    def _take(self, output_dir: Path) -> bool:
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            print(f"note: {output_dir} cannot be locked ({error.strerror}): make sure that no two runs write there")
        if self._path.exists() and os.path.samestat(os.stat(self._path), os.fstat(self._handle)):
            return True
        os.close(self._handle)  # its holder has removed the file meanwhile
        self._handle = self._open()
        return False

    def release(self, remove: bool = False) -> None:
        """Release the lock. remove: the file too, where nothing else was done in the folder."""
        self._holder.clear()
        if remove:
            with contextlib.suppress(OSError):  # a disk that fails: the run's own error is the one to show
                self._path.unlink(missing_ok=True)
        os.close(self._handle)
