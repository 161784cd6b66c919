"""One entry of the feature cache: a folder of shards that any number of processes may build at once.

Files: examples-N.arrow, features-N.arrow, index.arrow, rejected.json, and manifest.json, which is written last and
names size and checksum of all others. While the entry is being built each shard has a mark beside it (.json) that says
it is complete, and a lock (.lock) that the kernel frees when its holder dies.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import filelock
import numpy as np

from qa_deepspeed.qa.features.arrow import (
    Column,
    Columns,
    CorruptFile,
    check_size,
    storage_error,
    write_atomically,
    write_columns,
)
from qa_deepspeed.utils.errors import UserError

POLL_SECONDS = 0.05
"""How often a process with nothing to do looks whether the others are done."""

Progress = Callable[[int, "int | None"], None]
Mark = dict[str, Any]

log = logging.getLogger(__name__)


class Work(Protocol):
    """What the entry's content is made by; each call gives the same content every time."""

    def example_shards(self) -> Iterator[dict[str, Column]]:
        """Read the input; the columns of each shard of examples in turn."""

    def report(self) -> dict[str, Any]:
        """What became of the questions; asked for after the last shard."""

    def features(self, examples: Columns) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        """The feature columns of one shard of examples, and its counts."""

    def index(self, shards: Iterator[tuple[int, Columns]]) -> dict[str, np.ndarray]:
        """lengths and example_index over all features, from (examples before, feature columns) of each shard."""


class CacheEntry:
    """A folder of the cache, complete once it has a manifest."""

    def __init__(self, folder: Path, fingerprint: str, work: Work):
        self.folder = folder
        self._fingerprint = fingerprint
        self._work = work
        self._built: dict[str, int] = {}

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None while the entry is not complete."""
        manifest = self._json("manifest")
        return manifest if manifest is not None and manifest.get("fingerprint") == self._fingerprint else None

    def tidy(self) -> None:
        """Clear away what a builder left that was killed between its last write and the end."""
        if (self.folder / "reading.json").exists():
            with contextlib.suppress(OSError):
                self._clear_away()

    def discard(self, older_than: float) -> None:
        """Delete what was written before this time (seconds since the epoch), to be built again."""
        if not self.folder.is_dir():
            return
        with self._lock("discard"):
            files = [self.folder / "manifest.json", *self.folder.glob("*.arrow"), *self.folder.glob("*.json")]
            for path in files:
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < older_than:
                        path.unlink()

    def build(self, progress: Progress | None) -> dict[str, Any]:
        """Bring the entry to completion together with whoever else is at it; returns the manifest.

        Raises: UserError if the input has nothing usable, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while (manifest := self.manifest()) is None:
                if not (self._read() or self._claim_features(progress) or self._finish()):
                    time.sleep(POLL_SECONDS)
            return manifest
        except OSError as error:
            raise storage_error(self.folder / "manifest.json", error) from error

    def columns(self, name: str, mark: Mark, remake: Callable[[], Mark]) -> Columns:
        """The columns of a file of the entry, made again if it is not what its mark says."""
        path = self.folder / f"{name}.arrow"
        try:
            return Columns(path, mark["size"], mark["checksum"])
        except CorruptFile as error:
            log.warning("%s; it is made again", error)
        try:
            with self._lock(f"{name}.repair"):
                with contextlib.suppress(CorruptFile):
                    return Columns(path, mark["size"], mark["checksum"])
                made = remake()
        except OSError as error:
            raise storage_error(path, error) from error
        if (made.get("size"), made.get("checksum")) != (mark["size"], mark["checksum"]):
            raise UserError(f"{path}: was damaged and cannot be made again alike; build it anew with --overwrite_cache")
        return Columns(path, mark["size"], mark["checksum"])

    def examples(self, number: int, mark: Mark) -> Columns:
        """One shard of examples."""
        return self.columns(f"examples-{number:05d}", mark, lambda: self._write_examples(only=number).get(number, {}))

    def features(self, number: int, examples_mark: Mark, mark: Mark) -> Columns:
        """One shard of features."""
        return self.columns(
            f"features-{number:05d}", mark, lambda: self._write_features(number, self.examples(number, examples_mark))
        )

    def index(self, manifest: dict[str, Any]) -> Columns:
        """The columns over all features: lengths and example_index."""
        return self.columns("index", manifest["index"], lambda: self._write_index(manifest["shards"]))

    def check_sizes(self, manifest: dict[str, Any]) -> None:
        """Find cut-off or missing shards at once, and make them again."""
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
        """The rejected questions that the report of the manifest counts."""
        found = self._json("rejected")
        return [] if found is None else found["rejected"]

    # ---- building ----

    def _read(self) -> bool:
        """Read the input into shards of examples, unless that is done or another process is at it."""
        if self._json("reading") is not None:
            return False
        with self._claim("reading") as claimed:
            if not claimed or self._json("reading") is not None or self.manifest() is not None:
                return False
            marks = self._write_examples()
            report = self._work.report()
            rejected = report.pop("rejected", [])
            if rejected:
                self._write_json("rejected", {"rejected": rejected})
            examples = sum(mark["examples"] for mark in marks.values())
            self._write_json("reading", {"shards": len(marks), "examples": examples, "report": report})
            return True

    def _write_examples(self, only: int | None = None) -> dict[int, Mark]:
        """Write the shards of examples that have no mark yet, or `only` this one; the marks by number."""
        marks: dict[int, Mark] = {}
        for number, columns in enumerate(self._work.example_shards()):
            name = f"examples-{number:05d}"
            found = self._json(name) if only is None else None
            if found is None and only in (None, number):
                found = write_columns(self.folder / f"{name}.arrow", columns)
                found["examples"] = len(columns["example_ids"])
                if only is None:
                    self._write_json(name, found)
            if found is not None:
                marks[number] = found
        return marks

    def _claim_features(self, progress: Progress | None) -> bool:
        """Build the features of one shard that nobody has built or is building; False if there is none."""
        names = {path.name for path in self.folder.iterdir()}
        for number in range(len(names)):
            mark_name = f"examples-{number:05d}.json"
            if mark_name not in names:
                break
            if f"features-{number:05d}.json" in names:
                continue
            with self._claim(f"features-{number:05d}") as claimed:
                if not claimed or self._json(f"features-{number:05d}") is not None or self.manifest() is not None:
                    continue
                examples_mark = self._json(f"examples-{number:05d}")
                if examples_mark is None:
                    continue
                made = self._write_features(number, self.examples(number, examples_mark))
                self._write_json(f"features-{number:05d}", made)
            if progress is not None:
                progress(*self._done())
            return True
        return False

    def _write_features(self, number: int, examples: Columns) -> Mark:
        columns, counts = self._work.features(examples)
        return {**write_columns(self.folder / f"features-{number:05d}.arrow", columns), "counts": counts}

    def _done(self) -> tuple[int, int | None]:
        """Examples whose features are built, and of how many, as far as that is known."""
        for path in self.folder.glob("features-*.json"):
            if path.stem not in self._built and (mark := self._json(path.stem)) is not None:
                self._built[path.stem] = mark["counts"]["examples"]
        reading = self._json("reading")
        return sum(self._built.values()), None if reading is None else reading["examples"]

    def _finish(self) -> bool:
        """Write index and manifest once every shard is there, and clear away the marks."""
        reading = self._json("reading")
        if reading is None:
            return False
        with self._claim("manifest") as claimed:
            if not claimed or self.manifest() is not None:
                return False
            shards = [
                {kind: mark for kind in ("examples", "features") if (mark := self._json(f"{kind}-{number:05d}"))}
                for number in range(reading["shards"])
            ]
            if any(len(shard) < 2 for shard in shards):
                return False
            counts: dict[str, int] = {}
            for shard in shards:
                of_shard = shard["features"].pop("counts")
                shard["features"]["features"] = of_shard["features"]
                for name, count in of_shard.items():
                    counts[name] = counts.get(name, 0) + count
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
        self._clear_away()
        return True

    def _write_index(self, shards: list[dict[str, Mark]]) -> Mark:
        def opened() -> Iterator[tuple[int, Columns]]:
            before = 0
            for number, shard in enumerate(shards):
                yield before, self.features(number, shard["examples"], shard["features"])
                before += shard["examples"]["examples"]

        return write_columns(self.folder / "index.arrow", self._work.index(opened()))

    def _clear_away(self) -> None:
        """Delete marks, locks and what killed builders left; whoever still gets a lock then sees the manifest."""
        keep = {"manifest.json", "rejected.json", "manifest.lock", "reading.json"}
        for pattern in ("*.json", "*.lock", ".*.tmp"):
            for path in self.folder.glob(pattern):
                if path.name not in keep:
                    path.unlink(missing_ok=True)
        # The last to go: while it is there, `tidy` knows that this was not finished.
        (self.folder / "reading.json").unlink(missing_ok=True)

    # ---- small files and locks ----

    def _json(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.folder / f"{name}.json", json.dumps(content).encode())

    def _lock(self, name: str) -> filelock.BaseFileLock:
        return filelock.FileLock(self.folder / f"{name}.lock", poll_interval=POLL_SECONDS)

    @contextlib.contextmanager
    def _claim(self, name: str) -> Iterator[bool]:
        """Whether this process now holds the lock; it does not wait for it."""
        lock = self._lock(name)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()
