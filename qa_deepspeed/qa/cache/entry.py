"""One entry of the feature cache: a folder of shards that any number of processes may build at once.

Files: examples-N.arrow, features-N.arrow, index.arrow, rejected.json, and manifest.json, which is written last and
holds size and checksum of all others. While the entry is being built, each complete shard has a status file of the same
name (.json) and each shard in work a lock (.lock), which the kernel releases when its holder dies.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qa_deepspeed.qa.cache.background import BackgroundCall
from qa_deepspeed.qa.cache.waiting import HOLDER_SUFFIX, POLL_SECONDS, Locks
from qa_deepspeed.qa.features.arrow import ArrowFile, Column, CorruptFile, check_size, write_columns
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import write_bytes

ProgressCallback = Callable[[int, "int | None"], None]

Status = dict[str, Any]
"""Status of a complete shard: `size` and `checksum` of its file; `examples` or `counts` of what it holds."""

log = logging.getLogger(__name__)


class EntryContent(Protocol):
    """What an entry holds, built on demand; each call gives the same content every time."""

    def example_shards(self) -> Iterator[dict[str, Column]]:
        """Read the input; yield the columns of each shard of examples."""

    def report(self) -> dict[str, Any]:
        """Counts of questions by outcome; available after the last shard."""

    def features(self, examples: ArrowFile) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        """The feature columns of one shard of examples, and its counts."""

    def index(self, shards: Iterator[tuple[int, ArrowFile]]) -> dict[str, np.ndarray]:
        """lengths and example_index over all features, from (examples before, feature columns) of each shard."""


class CacheEntry:
    """A folder of the cache, complete once it has a manifest."""

    def __init__(self, folder: Path, fingerprint: str, content: EntryContent, timeout_seconds: float = math.inf):
        self.folder = folder
        self._locks = Locks(folder, timeout_seconds)
        self._fingerprint = fingerprint
        self._content = content
        self._built: dict[str, int] = {}

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None while the entry is not complete."""
        manifest = self._read_json("manifest")
        return manifest if manifest is not None and manifest.get("fingerprint") == self._fingerprint else None

    def remove_leftovers(self) -> None:
        """Delete the status files of a complete entry whose builder was killed before it deleted them."""
        if (self.folder / "reading.json").exists():
            with contextlib.suppress(OSError):
                self._delete_status_files()

    def discard(self, older_than: float) -> None:
        """Delete files written before this time (seconds since the epoch), so that they are built again."""
        if not self.folder.is_dir():
            return
        with self._locks.lock("discard"):
            files = [self.folder / "manifest.json", *self.folder.glob("*.arrow"), *self.folder.glob("*.json")]
            for path in files:
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < older_than:
                        path.unlink()

    def build(self, progress: ProgressCallback | None) -> dict[str, Any]:
        """Complete the entry, together with any other process that builds it; returns the manifest.

        The input is read in a thread, which works while the tokenizer has released Python's lock.

        Raises:
            UserError: the input has nothing usable, the folder cannot be written, or another process that builds a part
                makes no progress for the timeout.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self._build(progress)
        except OSError as error:
            raise _storage_error(self.folder, error) from error

    def open(self, name: str, status: Status, rebuild: Callable[[], Status]) -> ArrowFile:
        """A file of the entry, rebuilt if it does not match its status."""
        path = self.folder / f"{name}.arrow"
        try:
            return ArrowFile(path, status["size"], status["checksum"])
        except CorruptFile as error:
            log.warning("%s; rebuilding it", error)
        try:
            with self._locks.lock(f"{name}.repair"):
                # Another process may have rebuilt it in the meantime.
                with contextlib.suppress(CorruptFile):
                    return ArrowFile(path, status["size"], status["checksum"])
                rebuilt = rebuild()
        except OSError as error:
            raise _storage_error(self.folder, error) from error
        if (rebuilt.get("size"), rebuilt.get("checksum")) != (status["size"], status["checksum"]):
            raise UserError(f"{path}: is damaged and rebuilding it gave other content; pass --overwrite_cache")
        return ArrowFile(path, status["size"], status["checksum"])

    def examples(self, number: int, status: Status) -> ArrowFile:
        """One shard of examples."""
        return self.open(f"examples-{number:05d}", status, lambda: self._write_examples(only=number).get(number, {}))

    def features(self, number: int, examples_status: Status, status: Status) -> ArrowFile:
        """One shard of features."""
        return self.open(
            f"features-{number:05d}",
            status,
            lambda: self._write_features(number, self.examples(number, examples_status)),
        )

    def index(self, manifest: dict[str, Any]) -> ArrowFile:
        """The columns over all features: lengths and example_index."""
        return self.open("index", manifest["index"], lambda: self._write_index(manifest["shards"]))

    def repair_sizes(self, manifest: dict[str, Any]) -> None:
        """Rebuild missing and truncated shards. Checksums are verified when a shard is opened."""
        for number, shard in enumerate(manifest["shards"]):
            for kind in ("examples", "features"):
                try:
                    check_size(self.folder / f"{kind}-{number:05d}.arrow", shard[kind]["size"])
                except CorruptFile:
                    if kind == "examples":
                        self.examples(number, shard["examples"])
                    else:
                        self.features(number, shard["examples"], shard["features"])

    def rejected(self) -> list[dict[str, Any]]:
        """The rejected questions that the report in the manifest counts."""
        found = self._read_json("rejected")
        return [] if found is None else list(found["rejected"])

    # ---- building ----

    def _build(self, progress: ProgressCallback | None) -> dict[str, Any]:
        reading = BackgroundCall(self._build_examples)
        try:
            while (manifest := self.manifest()) is None:
                if not reading.running() and self._read_json("reading") is None:
                    reading.start()
                if self._build_one_features_shard(progress) or self._build_manifest() or reading.wait(POLL_SECONDS):
                    self._locks.progress()
                else:
                    self._locks.wait()
        finally:
            reading.cancel()
        return manifest

    def _build_examples(self, check: Callable[[], None]) -> bool:
        """Read the input into shards of examples; False if that is done or another process does it.

        check: called at each shard.
        """
        with self._locks.try_lock("reading") as locked:
            if not locked or self._read_json("reading") is not None or self.manifest() is not None:
                return False
            statuses = self._write_examples(check=check)
            report = self._content.report()
            rejected = report.pop("rejected", [])
            if rejected:
                self._write_json("rejected", {"rejected": rejected})
            examples = sum(status["examples"] for status in statuses.values())
            self._write_json("reading", {"shards": len(statuses), "examples": examples, "report": report})
            return True

    def _write_examples(self, only: int | None = None, check: Callable[[], None] = lambda: None) -> dict[int, Status]:
        """Write the shards of examples that have no status yet, or `only` this one; returns statuses by number."""
        statuses: dict[int, Status] = {}
        for number, columns in enumerate(self._content.example_shards()):
            check()
            name = f"examples-{number:05d}"
            status = self._read_json(name) if only is None else None
            if status is None and only in (None, number):
                status = {
                    **write_columns(self.folder / f"{name}.arrow", columns),
                    "examples": len(columns["example_ids"]),
                }
                if only is None:
                    self._write_json(name, status)
            if status is not None:
                statuses[number] = status
        return statuses

    def _build_one_features_shard(self, progress: ProgressCallback | None) -> bool:
        """Build the features of one shard that is neither complete nor in work; False if there is none."""
        names = {path.name for path in self.folder.iterdir()}
        for number in range(len(names)):
            name = f"features-{number:05d}"
            if f"examples-{number:05d}.json" not in names:
                break
            if f"{name}.json" in names:
                continue
            with self._locks.try_lock(name) as locked:
                if not locked or self._read_json(name) is not None or self.manifest() is not None:
                    continue
                examples_status = self._read_json(f"examples-{number:05d}")
                if examples_status is None:
                    continue
                self._write_json(name, self._write_features(number, self.examples(number, examples_status)))
            if progress is not None:
                progress(*self._examples_done())
            return True
        return False

    def _write_features(self, number: int, examples: ArrowFile) -> Status:
        columns, counts = self._content.features(examples)
        return {**write_columns(self.folder / f"features-{number:05d}.arrow", columns), "counts": counts}

    def _examples_done(self) -> tuple[int, int | None]:
        """Examples whose features are built, and the number of all; None before the input is read to its end."""
        for path in self.folder.glob("features-*.json"):
            if path.stem not in self._built and (status := self._read_json(path.stem)) is not None:
                self._built[path.stem] = status["counts"]["examples"]
        reading = self._read_json("reading")
        return sum(self._built.values()), None if reading is None else reading["examples"]

    def _build_manifest(self) -> bool:
        """Write index and manifest once all shards are complete, and delete the status files."""
        reading = self._read_json("reading")
        if reading is None:
            return False
        with self._locks.try_lock("manifest") as locked:
            if not locked or self.manifest() is not None:
                return False
            shards = [
                {
                    kind: status
                    for kind in ("examples", "features")
                    if (status := self._read_json(f"{kind}-{number:05d}"))
                }
                for number in range(reading["shards"])
            ]
            if any(len(shard) < 2 for shard in shards):
                return False
            counts = _total_counts(shards)
            index = self._write_index(shards)
            self._write_json(
                "manifest",
                {
                    "fingerprint": self._fingerprint,
                    "counts": counts,
                    "shards": shards,
                    "index": index,
                    "report": reading["report"],
                },
            )
        self._delete_status_files()
        return True

    def _write_index(self, shards: list[dict[str, Status]]) -> Status:
        def opened() -> Iterator[tuple[int, ArrowFile]]:
            before = 0
            for number, shard in enumerate(shards):
                yield before, self.features(number, shard["examples"], shard["features"])
                before += shard["examples"]["examples"]

        return {**write_columns(self.folder / "index.arrow", self._content.index(opened()))}

    def _delete_status_files(self) -> None:
        """Delete status files, locks and temporary files. A process that waits for a lock then finds the manifest."""
        keep = {"manifest.json", "rejected.json", "manifest.lock", "reading.json"}
        for pattern in ("*.json", "*.lock", f".*{HOLDER_SUFFIX}", ".*.tmp"):
            for path in self.folder.glob(pattern):
                if path.name not in keep:
                    path.unlink(missing_ok=True)
        # Last: while this file exists, `remove_leftovers` finds that the deletion is incomplete.
        (self.folder / "reading.json").unlink(missing_ok=True)

    # ---- small files ----

    def _read_json(self, name: str) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return content

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        write_bytes(self.folder / f"{name}.json", json.dumps(content).encode())


def _total_counts(shards: list[dict[str, Status]]) -> dict[str, int]:
    """The sum of the shards' counts, of which each status keeps only `features`."""
    total: dict[str, int] = {}
    for shard in shards:
        counts = shard["features"].pop("counts")
        shard["features"]["features"] = counts["features"]
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    return total


def _storage_error(folder: Path, error: OSError) -> UserError:
    """The one line about a folder that cannot hold the cache."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"{folder}: the disk is full; free some space or pass another --cache_dir")
    return UserError(f"{folder}: cannot write the feature cache ({error.strerror}); pass another --cache_dir")
