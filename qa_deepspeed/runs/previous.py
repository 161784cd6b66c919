"""--overwrite_output_dir: the earlier run is moved aside, and deleted when the new run has saved something.

It is put back when the start fails, or at the next start if the process was killed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from qa_deepspeed.engine.checkpoints.checkpoint_files import checkpoints
from qa_deepspeed.runs.folder import files_of_run

PREFIX = ".previous-run."

MOVING = f"{PREFIX}moving."
"""Prefix while files are moved into the folder or out of it: all that is in the output folder is the earlier run's."""


class PreviousRun:
    """An earlier run's files in a hidden folder of the output folder, on the same disk. For rank 0."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def move_aside(cls, output_dir: Path, paths: Iterable[Path]) -> PreviousRun:
        """Move `paths`, entries of `output_dir`, aside, all or none; links themselves, never what they point to."""
        previous = cls(Path(tempfile.mkdtemp(prefix=MOVING, dir=output_dir)))
        try:
            for path in paths:
                os.rename(path, previous._folder / path.name)
            previous._rename(PREFIX)
        except OSError:
            previous.restore()
            raise
        return previous

    @property
    def is_moving(self) -> bool:
        """Whether a move was interrupted: the output folder holds the rest of the earlier run, and nothing new."""
        return self._folder.name.startswith(MOVING)

    def _rename(self, prefix: str) -> None:
        name = prefix + self._folder.name.rpartition(".")[2]
        self._folder = self._folder.rename(self._folder.with_name(name))

    def discard(self) -> None:
        """Delete the earlier run: the new one has saved a checkpoint or its model."""
        for path in list(self._folder.iterdir()) if self._folder.is_dir() else []:
            remove_entry(path)
        if self._folder.is_dir():
            self._folder.rmdir()

    def restore(self) -> None:
        """Put the earlier run back in place of what the new one has written so far. Does nothing after `discard`."""
        if not self._folder.is_dir():
            return
        output_dir = self._folder.parent
        if not self.is_moving:
            for path in files_of_run(output_dir):
                remove_entry(path)
            self._rename(MOVING)
        for path in self._folder.iterdir():
            os.rename(path, output_dir / path.name)
        self._folder.rmdir()


def recover(output_dir: Path) -> bool:
    """After a kill: put back a run that was moved aside for one that has saved nothing, else delete it.

    Returns whether a run was put back. For rank 0.
    """
    restored = False
    for folder in sorted(output_dir.glob(f"{PREFIX}*")):
        previous = PreviousRun(folder)
        if checkpoints(output_dir) and not previous.is_moving:
            previous.discard()
        else:
            previous.restore()
            restored = True
    return restored


def remove_entry(path: Path) -> None:
    """Delete a file, a folder, or a link itself."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
