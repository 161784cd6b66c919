"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qa_deepspeed.utils.errors import UserError


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all (temporary name, then rename)."""
    # half a surrogate pair, which has no UTF-8 form, becomes the escape that JSON has for it
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", errors="backslashreplace")


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write UTF-8 text, whole or not at all. `errors` as in `str.encode`."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors=errors) as file:
            file.write(text)
        apply_umask(Path(temporary))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def os_errors_as_user_errors(path: Path) -> Iterator[None]:
    """Inside, a disk that refuses is a UserError which says that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def apply_umask(path: Path) -> None:
    """Give a file the rights that new files have: safetensors gives its own to nobody but their owner."""
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
