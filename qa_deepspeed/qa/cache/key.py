"""The content key of a cache entry: whatever could change a feature is in it, and nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qa_deepspeed.qa.data.reading import DataSource
from qa_deepspeed.qa.features.arrow import write_atomically
from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.qa.features.families import Family
from qa_deepspeed.qa.features.template import Template
from qa_deepspeed.utils.errors import UserError

DIGESTS = "digests.json"
SETTLED_SECONDS = 2.0
"""A file changed later than this long ago may change again within the resolution of its times: not remembered."""


FORMAT_VERSION = 1
"""The version of what a cache entry holds. Raise it by hand with every change of the features or of the files.

A golden test fails when features of a fixed input change while this number does not.
"""

_KEYED_AS = {1: "a6ccc69e252a31f27080610309dd3859fb54873acaa37f6befbf785db6217882"}
"""What stands for a version in the key, where it is not the number: version 1 was a digest of source files."""


def cache_key(
    digests: list[str],
    source: DataSource,
    tokenizer_state: str,
    template: Template,
    family: Family,
    settings: FeatureSettings,
) -> str:
    """64 hexadecimal digits that stand for the content of the features."""
    read = asdict(source)
    del read["files"]
    if source.max_examples is None or source.purpose == "evaluate":
        del read["seed"]
    shape = asdict(settings)
    if source.purpose == "evaluate":
        del shape["windows_without_answer"]
    content = {
        "code": _KEYED_AS.get(FORMAT_VERSION, f"format {FORMAT_VERSION}"),
        "files": digests,
        "read": read,
        "settings": shape,
        "tokenizer": hashlib.sha256(tokenizer_state.encode("utf-8", "surrogatepass")).hexdigest(),
        "template": asdict(template),
        "token_type_ids": family.sends_token_type_ids,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class InputDigests:
    """SHA-256 of input files, remembered in the cache folder by path, size, times and inode."""

    def __init__(self, cache_dir: Path):
        self._path = cache_dir / DIGESTS

    def of(self, files: tuple[str, ...]) -> list[str]:
        """The digest of each file. Raises: UserError if one cannot be read."""
        known = self._read()
        fresh: dict[str, Any] = {}
        digests = []
        for name in files:
            path = Path(name).absolute()
            identity = file_identity(path)
            entry = known.get(str(path))
            if entry is None or entry[:-1] != identity:
                entry = [*identity, _sha256(path)]
                if time.time() - max(identity[1:3]) / 1e9 > SETTLED_SECONDS:
                    fresh[str(path)] = entry
            digests.append(entry[-1])
        if fresh:
            # A folder that cannot be written only costs the digests again.
            with contextlib.suppress(UserError, OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self._path, json.dumps({**self._read(), **fresh}).encode())
        return digests

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}


def file_identity(path: Path) -> list[int]:
    """Size, times of change (of the content, of the inode; nanoseconds), and inode number.

    The second time tells a change that kept the first. Raises: UserError if there is no such file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    return digest.hexdigest()
