"""What those know that wait for a lock: who holds it, and whether files in its folder change."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

HOLDER_SUFFIX = ".holder"


def file_times(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, tuple[int, int]]:
    """Size and time (nanoseconds) of every file in a folder but those whose names end so: a growing file is progress.

    No clock is compared with these times, only one answer with the next.
    """
    found = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if not entry.name.endswith(leave_out):
                    status = entry.stat()
                    found[entry.name] = (status.st_size, status.st_mtime_ns)
    return found


class Holder:
    """The file beside a lock, `.NAME.holder` for NAME.lock, in which the process that has the lock names itself.

    A file of its own: filelock empties the lock's own file whenever it is tried, and closing a second handle of that
    file would release a record lock.
    """

    def __init__(self, lock: Path) -> None:
        self._path = lock.with_name(f".{lock.name.lstrip('.').removesuffix('.lock')}{HOLDER_SUFFIX}")

    def note(self) -> None:
        """Name this process; not on a full disk, where the lock is held all the same."""
        with contextlib.suppress(OSError):
            self._path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")

    def clear(self) -> None:
        """Remove the file, before the lock is released."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def read(self) -> str:
        """`process N on HOST`, or `an unknown process`."""
        try:
            return self._path.read_text(encoding="utf-8", errors="replace").strip() or "an unknown process"
        except OSError:
            return "an unknown process"
