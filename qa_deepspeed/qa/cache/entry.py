"""One entry of the feature cache: a folder of shards that any number of processes may build at once.

Files: examples-N.arrow, features-N.arrow, index.arrow, rejected.json, and manifest.json, which is written last and
holds the checksums of all others and of itself. While the entry is being built, each complete shard has a status file
of the same name (.json) and each shard in work a lock (.lock), which the kernel releases when its holder dies.
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
from qa_deepspeed.qa.cache.manifest import Status, checksum_of, shape_of, total_counts
from qa_deepspeed.qa.cache.waiting import POLL_SECONDS, Locks
from qa_deepspeed.qa.features.arrow import ArrowFile, Column, CorruptFile, check_size, write_columns
from qa_deepspeed.utils.errors import StorageError, UserError
from qa_deepspeed.utils.files import write_bytes
from qa_deepspeed.utils.json_files import DamagedFile, read_json, sealed
from qa_deepspeed.utils.locks import HOLDER_SUFFIX

ProgressCallback = Callable[[int, "int | None"], None]

OVERWRITTEN = ".overwritten"
"""The file with the token of the run for which an entry was last discarded."""

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
        self._complete: dict[str, Status] = {}
        self._named: set[str] = set()

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None while the entry is not complete."""
        manifest = self._read_json("manifest")
        return manifest if manifest is not None and manifest.get("fingerprint") == self._fingerprint else None

    def remove_leftovers(self) -> None:
        """Delete the status files of a complete entry whose builder was killed before it deleted them."""
        if (self.folder / "reading.json").exists():
            with contextlib.suppress(OSError):
                self._delete_status_files()

    def discard(self, token: str) -> None:
        """Delete all files, once for a `token`, which the ranks of one run have in common: they are built again."""
        marker = self.folder / OVERWRITTEN
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locks.lock("discard"):
                with contextlib.suppress(FileNotFoundError):
                    if marker.read_bytes() == token.encode():
                        return
                for path in (self.folder / "manifest.json", *self.folder.glob("*.arrow"), *self.folder.glob("*.json")):
                    path.unlink(missing_ok=True)
                write_bytes(marker, token.encode())
        except OSError as error:
            raise storage_error(self.folder, error) from error

    def build(self, progress: ProgressCallback | None) -> dict[str, Any]:
        """Complete the entry, together with any other process that builds it; returns the manifest.

        The input is read in a thread, which works while the tokenizer has released Python's lock.

        Raises:
            UserError: the input has nothing usable, or the folder cannot be written.
            LostRankError: another process that builds a part makes no progress for the timeout.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self._build(progress)
        except OSError as error:
            raise storage_error(self.folder, error) from error

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
            raise storage_error(self.folder, error) from error
        if (rebuilt.get("size"), rebuilt.get("checksum")) != (status["size"], status["checksum"]):
            raise UserError(f"{path}: is damaged and rebuilding it gave other content; pass --overwrite_cache")
        try:
            return ArrowFile(path, status["size"], status["checksum"])
        except CorruptFile as error:
            raise StorageError(f"{error}, also after it was built again: the disk fails") from None

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

    def rejected(self, manifest: dict[str, Any]) -> list[dict[str, Any]]:
        """The rejected questions that the report in the manifest counts; the input is read again for damaged ones."""
        count = sum(manifest["report"]["rejected_by_reason"].values())
        if not count:
            return []
        found = self._read_json("rejected")
        if (
            found is None
            or len(found["rejected"]) != count
            or manifest.get("rejected") not in (None, checksum_of(found))
        ):
            if "rejected" not in self._named:
                log.warning("%s: missing or altered; reading the input again", self.folder / "rejected.json")
            for _ in self._content.example_shards():
                pass
            found = {"rejected": self._content.report()["rejected"]}
            with contextlib.suppress(OSError):  # a read-only cache
                self._write_json("rejected", found)
        return list(found["rejected"])

    # ---- building ----

    def _build(self, progress: ProgressCallback | None) -> dict[str, Any]:
        reading = BackgroundCall(self._build_examples)
        try:
            while (manifest := self.manifest()) is None:
                if not reading.running() and self._reading() is None:
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
            if not locked or self._reading() is not None or self.manifest() is not None:
                return False
            statuses = self._write_examples(check=check)
            report = self._content.report()
            rejected = {"rejected": report.pop("rejected", [])}
            if rejected["rejected"]:
                self._write_json("rejected", rejected)
            examples = sum(status["examples"] for status in statuses.values())
            reading = {
                "shards": len(statuses),
                "examples": examples,
                "report": report,
                "rejected": checksum_of(rejected),
            }
            self._write_json("reading", sealed(reading))
            return True

    def _write_examples(self, only: int | None = None, check: Callable[[], None] = lambda: None) -> dict[int, Status]:
        """Write the shards of examples that have no status yet, or `only` this one; returns statuses by number."""
        statuses: dict[int, Status] = {}
        for number, columns in enumerate(self._content.example_shards()):
            check()
            name = f"examples-{number:05d}"
            status = self._status(name) if only is None else None
            if status is None and only in (None, number):
                status = {
                    **write_columns(self.folder / f"{name}.arrow", columns),
                    "examples": len(columns["example_ids"]),
                }
                if only is None:
                    self._write_json(name, sealed(status))
            if status is not None:
                statuses[number] = status
        return statuses

    def _build_one_features_shard(self, progress: ProgressCallback | None) -> bool:
        """Build the features of one shard that is neither complete nor in work; False if there is none."""
        names = self._names()
        for number in range(len(names)):
            name = f"features-{number:05d}"
            if f"examples-{number:05d}.json" not in names:
                break
            if f"{name}.json" in names and self._status(name) is not None:
                continue
            with self._locks.try_lock(name) as locked:
                if not locked or self._status(name) is not None or self.manifest() is not None:
                    continue
                examples_status = self._status(f"examples-{number:05d}")
                if examples_status is None:
                    continue
                status = self._write_features(number, self.examples(number, examples_status))
                self._write_json(name, sealed(status))
            if progress is not None:
                progress(*self._examples_done())
            return True
        return False

    def _write_features(self, number: int, examples: ArrowFile) -> Status:
        columns, counts = self._content.features(examples)
        return {**write_columns(self.folder / f"features-{number:05d}.arrow", columns), "counts": counts}

    def _examples_done(self) -> tuple[int, int | None]:
        """Examples whose features are built, and the number of all; None before the input is read to its end."""
        found = (self._status(path.stem) for path in self.folder.glob("features-*.json"))
        reading = self._read_json("reading")
        done = sum(status["counts"]["examples"] for status in found if status is not None)
        return done, None if reading is None else reading["examples"]

    def _build_manifest(self) -> bool:
        """Write index and manifest once all shards are complete, and delete the status files."""
        reading = self._reading()
        if reading is None:
            return False
        with self._locks.try_lock("manifest") as locked:
            if not locked or self.manifest() is not None:
                return False
            shards = [
                {
                    kind: dict(status)
                    for kind in ("examples", "features")
                    if (status := self._status(f"{kind}-{number:05d}"))
                }
                for number in range(reading["shards"])
            ]
            if any(len(shard) < 2 for shard in shards):
                return False
            counts = total_counts(shards)
            manifest = {
                "fingerprint": self._fingerprint,
                "counts": counts,
                "shards": shards,
                "index": self._write_index(shards),
                "report": reading["report"],
            }
            if "rejected" in reading:  # not where an earlier version read the input
                manifest["rejected"] = reading["rejected"]
            self._write_json("manifest", sealed(manifest))
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

    def _reading(self) -> dict[str, Any] | None:
        """What is known of the input; None until it was read to its end and all shards of examples are there."""
        reading = self._read_json("reading")
        complete = reading is not None and all(
            self._status(f"examples-{number:05d}") is not None for number in range(reading["shards"])
        )
        return reading if complete else None

    def _status(self, name: str) -> Status | None:
        """The status of a shard, which does not change once it is complete; None before."""
        if name not in self._complete and (status := self._read_json(name)) is not None:
            self._complete[name] = status
        return self._complete.get(name)

    def _names(self) -> set[str]:
        """Names in the folder. Statuses that another run has discarded are forgotten."""
        names = {path.name for path in self.folder.iterdir()}
        for name in list(self._complete):  # another thread may add to it
            if f"{name}.json" not in names:
                self._complete.pop(name, None)
        return names

    def _read_json(self, name: str) -> dict[str, Any] | None:
        """A file of the entry; None where it is missing or damaged, which is named once."""
        path = self.folder / f"{name}.json"
        try:
            content: dict[str, Any] | None = read_json(path, shape_of(name), exact=True)
        except DamagedFile as error:
            if name not in self._named:
                log.warning("%s; building it again", error)
            self._named.add(name)
            return None
        return content

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        write_bytes(self.folder / f"{name}.json", json.dumps(content).encode())


def storage_error(folder: Path, error: OSError) -> UserError:
    """The one line about a folder that cannot hold the cache."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(f"{folder}: the disk is full; free some space or pass another --cache_dir")
    return StorageError(f"{folder}: cannot write the feature cache ({error.strerror}); pass another --cache_dir")
