"""The content key of a cache entry: whatever could change a feature is in it, and nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qa_deepspeed.errors import UserError
from qa_deepspeed.models.families import Family
from qa_deepspeed.qa.arrow_files import write_atomically
from qa_deepspeed.qa.features import FeatureSettings
from qa_deepspeed.qa.pairing import Template
from qa_deepspeed.qa.readers import DataSource

DIGESTS = "digests.json"
SETTLED_SECONDS = 2.0
"""A file changed later than this long ago may change again within the resolution of its times: not remembered."""


SHAPING_MODULES = (
    "arrow_files", "cache_entry", "cache_key", "encoding", "example_store", "examples", "feature_cache",
    "feature_store", "features", "formats", "pairing", "python_tokenizers", "read_report", "readers", "seen_ids",
    "validation", "windows",
)  # fmt: skip
"""The modules of qa/ whose code can change what the cache holds: all that `feature_cache` imports, as a test checks."""


def _code_version() -> str:
    digest = hashlib.sha256()
    for name in SHAPING_MODULES:
        digest.update(name.encode() + b"\0" + Path(__file__).with_name(f"{name}.py").read_bytes() + b"\0")
    return digest.hexdigest()


CODE_VERSION = _code_version()
"""A digest of the code that shapes features: features of other code are never taken for features of this.

Taken when this is imported, as the code is: files that change later are not what this process runs.
"""


def cache_key(
    digests: list[str], source: DataSource, tokenizer_state: str, template: Template, family: Family,
    settings: FeatureSettings,
) -> str:  # fmt: skip
    """64 hexadecimal digits that stand for the content of the features."""
    read = asdict(source)
    del read["files"]
    if source.max_examples is None or source.purpose == "evaluate":
        del read["seed"]
    shape = asdict(settings)
    if source.purpose == "evaluate":
        del shape["windows_without_answer"]
    content = {
        "code": CODE_VERSION,
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
