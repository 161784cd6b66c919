"""The folder of an export: filled aside, and either complete or as empty as it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import move_files, os_errors_as_user_errors, write_json

RECORD_FILE = "run.json"
"""Written last: an export that has it is complete."""
PARTIAL = ".partial"
"""Folder inside the export's own until everything is verified: the folder itself may be a mounted disk, or the one that
the user is in."""


@contextmanager
def export_folder(out: Path) -> Iterator[Path]:
    """A folder whose files go to `out` when `place` is called; otherwise nothing of it is left at the end.

    Raises:
        UserError: `out` holds something or cannot be written.
    """
    there = out.exists()
    if there and (not out.is_dir() or any(path.name != PARTIAL or path.is_symlink() for path in out.iterdir())):
        raise UserError(f"{out} is not empty: name a new folder")
    aside = out / PARTIAL
    try:
        with os_errors_as_user_errors(out):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if not there and out.exists() and not any(out.iterdir()):
            out.rmdir()


def place(aside: Path, out: Path, record: dict[str, Any]) -> None:
    """Move the verified files into `out` and write the record, or leave `out` as empty as it was."""
    names = [path.name for path in aside.iterdir()]
    try:
        move_files(aside, out)
        write_json(out / RECORD_FILE, {"status": "exported", "export": record})
    except OSError:
        for name in names:
            (out / name).unlink(missing_ok=True)
        raise
