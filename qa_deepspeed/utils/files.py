"""Write files whole or not at all: under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from typing_extensions import Buffer

from qa_deepspeed.utils.errors import UserError


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all (temporary name, then rename)."""
    write_text(path, as_json(value))


def as_json(value: Any) -> str:
    """`value` as the JSON text of our files: indented, one line feed at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


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


def refuse_same_file(output: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse to write over what is read, also through a link.

    Raises:
        UserError: `output` is one of `inputs`.
    """
    for path in inputs:
        if output.exists() and os.path.exists(path) and os.path.samefile(output, path):
            raise UserError(f"{output} is the file that is read ({path}): name another file for the output")


@contextlib.contextmanager
def output_file(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file for a result that grows line by line; it gets its name when it is complete.

    After an error, what was written is kept as NAME.partial, and standard error says so. A device or a pipe is written
    to directly.

    Raises:
        UserError: it cannot be written.
    """
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    target = Path(os.path.realpath(path))  # a link stays one
    with os_errors_as_user_errors(path):
        if path.exists() and not path.is_file():
            with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
                yield file
            return
        with replacing(target) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            try:
                yield file
            except BaseException:
                file.flush()
                _keep_partial(temporary, target)
                raise


def _keep_partial(temporary: Path, target: Path) -> None:
    if temporary.stat().st_size:
        partial = target.with_name(f"{target.name}.partial")
        os.replace(temporary, partial)
        print(f"what was written until the error is kept in {partial}", file=sys.stderr)


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
