"""The content key of a cache entry: a digest of all inputs that can change a feature, and of nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qa_deepspeed.qa.data.reading import DataSource
from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.qa.features.families import Family
from qa_deepspeed.qa.features.template import Template
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import write_bytes
from qa_deepspeed.utils.json_files import DamagedFile, read_json, sealed

log = logging.getLogger(__name__)

DIGESTS = "digests.json"
SETTLED_SECONDS = 2.0
"""Digests of files that changed less than this ago are not stored: a second change might leave the times equal."""

FORMAT_VERSION = {"train": 1, "evaluate": 2}
"""The version of what a cache entry holds, by purpose. Raise it by hand with every change of the features or files.

A golden test fails when features of a fixed input change while this number does not. Version 1 has entries built before
text that spells special tokens (`</s>`, `[SEP]`) was encoded as text: such data needs --overwrite_cache once. Since
version 2, questions without gold answers are distinguished from unanswerable ones (`examples.NO_GOLD`).
"""

_KEYED_AS = {1: "a6ccc69e252a31f27080610309dd3859fb54873acaa37f6befbf785db6217882"}
"""Legacy text hashed in place of a version: version 1 was a digest of source files, so its entries are found."""


def cache_key(
    digests: list[str],
    source: DataSource,
    tokenizer_state: str,
    template: Template,
    family: Family,
    settings: FeatureSettings,
) -> str:
    """64 hexadecimal digits that identify the features.

    Field names of DataSource, FeatureSettings and Template are part of the key: renaming one loses every cache.

    Args:
        digests: SHA-256 of each input file.
        tokenizer_state: all that can change the tokenizer's output, as text.
    """
    read = asdict(source)
    del read["files"]
    if source.max_examples is None or source.purpose == "evaluate":
        del read["seed"]
    # Settings that earlier versions lack are part of the key only if they are used.
    for name in ("encoding", "validation", "by_file"):
        if not read[name]:
            del read[name]
    for name in ("answer_text", "answer_start"):
        if read["columns"][name] is None:
            del read["columns"][name]
    shape = asdict(settings)
    if source.purpose == "evaluate":
        del shape["windows_without_answer"]
    version = FORMAT_VERSION[source.purpose]
    content = {
        "code": _KEYED_AS.get(version, f"format {version}"),
        "files": digests,
        "read": read,
        "settings": shape,
        "tokenizer": hashlib.sha256(tokenizer_state.encode("utf-8", "surrogatepass")).hexdigest(),
        "template": asdict(template),
        "token_type_ids": family.sends_token_type_ids,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class InputDigests:
    """SHA-256 of input files, stored in the cache folder by path, size, times and inode."""

    def __init__(self, cache_dir: Path):
        self._path = cache_dir / DIGESTS

    def of(self, files: tuple[str, ...]) -> list[str]:
        """The digest of each file. Raises: UserError if one cannot be read."""
        try:
            known = self._read()
        except DamagedFile as error:
            log.warning("%s; hashing the input files again", error)
            known = {}
        fresh: dict[str, Any] = {}
        digests = []
        for name in files:
            path = Path(name).absolute()
            identity = file_identity(path)
            entry = known.get(str(path))
            if entry is None or entry[:-1] != identity or not isinstance(entry[-1], str):
                entry = [*identity, _sha256(path)]
                if time.time() - max(identity[1:3]) / 1e9 > SETTLED_SECONDS:
                    fresh[str(path)] = entry
            digests.append(entry[-1])
        if fresh:
            # Where the folder cannot be written, digests are computed again next time.
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(DamagedFile):
                    known = self._read()  # other processes may have added theirs
                write_bytes(self._path, json.dumps(sealed({**known, **fresh})).encode())
        return digests

    def _read(self) -> dict[str, Any]:
        return read_json(self._path, {str: [(int, str)]}) or {}


def file_identity(path: Path) -> list[int]:
    """Size, times of change (of the content, of the inode; nanoseconds), and inode number.

    The inode's time also changes where the content's time is set back. Raises: UserError if there is no such file.
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
