"""Progress of files that are read or written, in megabytes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qa_deepspeed.progress import Progress

MEGABYTE = 10**6

LOOK_SECONDS = 0.5
"""Between two looks at files that grow."""

BLOCK_BYTES = 512
"""What `st_blocks` counts in, whatever the disk."""


def reading(what: str, paths: Iterable[Path], shown: bool = True) -> Progress:
    """Progress of reading these files whole, which `sha256_of` advances."""
    return Progress(what, sum(_megabytes(path.stat().st_size) for path in paths), "megabyte", shown)


def sha256_of(path: Path, told: Progress) -> str:
    """The hexadecimal SHA-256 of a file, read a megabyte at a time; a last part counts as one."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(MEGABYTE):
            digest.update(block)
            told.advance()
    return digest.hexdigest()


@contextmanager
def writing(what: str, folder: Path, size: int) -> Iterator[None]:
    """While the body writes `size` bytes into `folder` by code that tells nothing itself, tell how far that is."""
    whole, over = _megabytes(size), threading.Event()

    def follow() -> None:
        while not over.wait(LOOK_SECONDS):
            with suppress(OSError):  # a file got its final name meanwhile
                told.reach(min(_written(folder) // MEGABYTE, whole))

    with Progress(what, whole, "megabyte") as told:
        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield
        finally:
            over.set()
            follower.join()
        told.reach(whole)


def _written(folder: Path) -> int:
    """Bytes that the folder's files take on the disk: their lengths are often set before they are filled."""
    return sum(path.stat().st_blocks * BLOCK_BYTES for path in folder.rglob("*") if path.is_file())


def _megabytes(size: int) -> int:
    return -(-size // MEGABYTE)
