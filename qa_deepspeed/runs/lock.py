"""One run at a time in an output folder: a lock that the living process holds."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from qa_deepspeed.utils.errors import UserError

LOCK_FILE = ".lock"

PATIENCE_SECONDS = 10.0
"""How long a run that was just killed may take to let go of its folder."""


class RunLock:
    """Holds `output_dir` for this process until `release`; the system lets go of it when the process ends.

    It is a record lock (lockf): processes that are forked from this one do not hold it, and NFS knows it.

    Raises:
        UserError: another living process holds it.
    """

    def __init__(self, output_dir: Path, patience: float = PATIENCE_SECONDS) -> None:
        self._handle = os.open(output_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        give_up = time.monotonic() + patience
        while not self._take(output_dir):
            if time.monotonic() > give_up:
                holder = os.pread(self._handle, 200, 0).decode(errors="replace").strip()
                os.close(self._handle)
                raise UserError(
                    f"another run is at work in {output_dir} ({holder or 'its process is not known'}): wait until it "
                    "is done, or pass another --output_dir"
                )
            time.sleep(0.2)
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _take(self, output_dir: Path) -> bool:
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            print(f"note: {output_dir} cannot be locked ({error.strerror}): see that no two runs write there")
        return True

    def release(self) -> None:
        """Let go of the folder."""
        os.close(self._handle)
