"""Write files whole or not at all: under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from typing_extensions import Buffer

from qa_deepspeed.utils.errors import StorageError, UserError

if TYPE_CHECKING:
    import numpy as np

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS, errno.ESTALE)
"""Error numbers of a disk that is full or fails."""

TORCH_TEXTS = ("PytorchStreamWriter failed", "iostream error", "unexpected pos")
"""Parts of torch's messages about a file that it could not write, which do not say why."""

ZEROS = 1 << 20
"""Bytes written at a time where the system has no call that allocates."""


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
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            error.filename, error.filename2 = str(path), None  # writing has no name, the temporary one says nothing
        raise


def move_files(source: Path, target: Path) -> None:
    """Move all files of a folder into another one of the same disk, each whole, and remove the folder."""
    for path in source.iterdir():
        os.replace(path, target / path.name)
    source.rmdir()


def disk_failure(error: BaseException) -> str | None:
    """What a full or failing disk did, as a phrase, by whichever library's exception; None for any other error.

    Libraries in Rust and C++ raise their own exceptions, of which only the message tells.
    """
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return os.strerror(error.errno)
    text = " ".join(str(error).split())
    for number in DISK_ERRORS:
        if os.strerror(number) in text:
            return os.strerror(number)
    return "it could not be written" if any(part in text for part in TORCH_TEXTS) else None


def disk_message(error: BaseException, path: Path | None = None) -> str | None:
    """`disk_failure` as one line that names the file, or `path` where the error names none."""
    reason = disk_failure(error)
    if reason is None:
        return None
    named = getattr(error, "filename", None)
    name = os.fsdecode(named) if isinstance(named, (str, bytes)) else path or "a file"
    return f"cannot {'read or write' if reason == os.strerror(errno.EIO) else 'write'} {name}: {reason}"


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
                with contextlib.suppress(OSError):  # the disk may be full
                    file.flush()
                _keep_partial(temporary, target)
                raise


def _keep_partial(temporary: Path, target: Path) -> None:
    if temporary.stat().st_size:
        partial = target.with_name(f"{target.name}.partial")
        os.replace(temporary, partial)
        print(f"what was written until the error is kept in {partial}", file=sys.stderr)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Inside, a disk that is full or fails becomes a StorageError, which names the file, or else `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = disk_message(error, path)
        if message is None:
            raise
        raise StorageError(message) from None


@contextlib.contextmanager
def os_errors_as_user_errors(path: Path) -> Iterator[None]:
    """`storage_errors`, and any other error of the system becomes a UserError (permissions, a name too long)."""
    try:
        with storage_errors(path):
            yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def mapped_array(folder: Path, dtype: np.dtype, rows: int) -> np.ndarray:
    """An array `[rows]` in an unnamed file of `folder`'s disk, which the system removes with the array.

    The disk's blocks are allocated before they are mapped: writing to a mapped file for which there is no room ends the
    process with SIGBUS.

    Raises:
        StorageError: the disk has no room for it, or fails.
    """
    import numpy as np  # here: the command line starts without it

    if not rows:
        return np.zeros(0, dtype)
    size = rows * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _allocate(file.fileno(), size)
            return np.memmap(file, dtype, "r+", shape=(rows,))
    except OSError as error:
        raise StorageError(
            f"cannot write {folder}: {error.strerror or error}; {size:,} bytes are needed for a temporary file"
        ) from None


def _allocate(handle: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    for begin in range(0, size, ZEROS):
        block = memoryview(bytes(min(ZEROS, size - begin)))
        while block:
            block = block[os.write(handle, block) :]


def apply_umask(path: Path) -> None:
    """Give a file the permissions of new files: tempfile and safetensors let only the owner read theirs."""
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
