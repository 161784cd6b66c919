"""Write files whole or not at all: under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typing_extensions import Buffer

from qa_deepspeed.utils.errors import UserError


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all (temporary name, then rename)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_bytes(path: Path, data: Buffer) -> None:
    """Write bytes, whole or not at all. Not synchronized with the disk (no fsync): check sizes or sums when reading."""
    with replacing(path) as temporary, open(temporary, "wb") as handle:
        handle.write(data)


def write_text(path: Path, text: str, errors: str = "backslashreplace") -> None:
    """Write UTF-8 text, whole or not at all.

    errors: as in `str.encode`, for what has no UTF-8 form: bytes of a file name, or half a surrogate pair. The default
        writes the escape that JSON has too.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a new empty file `.NAME.*.tmp` beside `path`, which gets its name at the end, or is removed on an error."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        apply_umask(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def move_files(source: Path, target: Path) -> None:
    """Move all files of a folder into another one of the same disk, each whole, and remove the folder."""
    for path in source.iterdir():
        os.replace(path, target / path.name)
    source.rmdir()


@contextlib.contextmanager
def os_errors_as_user_errors(path: Path) -> Iterator[None]:
    """Inside, an error of the disk becomes a UserError which says that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def apply_umask(path: Path) -> None:
    """Give a file the permissions of new files: tempfile and safetensors let only the owner read theirs."""
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
