"""Features of a source, from the cache or built into it: the one way in which training and evaluation get theirs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qa_deepspeed.qa.cache.entry import CacheEntry, Progress
from qa_deepspeed.qa.cache.key import InputDigests, cache_key, file_identity
from qa_deepspeed.qa.data.reading import DataSource, ReadReport, read_examples
from qa_deepspeed.qa.features.arrow import Column, Columns
from qa_deepspeed.qa.features.build import FeatureSettings, build_features, check_settings
from qa_deepspeed.qa.features.encoding import Encoder, FastEncoder, Tokens, serialize
from qa_deepspeed.qa.features.example_store import ExampleStore, shards_of
from qa_deepspeed.qa.features.families import Family
from qa_deepspeed.qa.features.slow_tokenizers import PythonEncoder, serialize_python
from qa_deepspeed.qa.features.store import FeatureShard, FeatureStore
from qa_deepspeed.qa.features.template import Template, check_template, find_template
from qa_deepspeed.qa.features.windows import splits_of
from qa_deepspeed.utils.errors import UserError

__all__ = ["FeatureSettings", "FeatureStore", "look_up", "prepare_features"]

STARTED = time.time()
"""When this process began: an entry older than this is what `overwrite` replaces, a younger one a fellow's work."""


def prepare_features(
    source: DataSource,
    tokenizer: Any,
    family: Family,
    settings: FeatureSettings,
    cache_dir: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> FeatureStore:
    """The features of a source, built into `cache_dir` unless they are there.

    Any number of processes, on one filesystem or several, may call this at once; they share the work through locks
    and need no other communication.

    Args:
        overwrite: build anew what was built before this process started.
        progress: called with the examples done and their number (None while it is not known).
    Raises:
        UserError: settings, tokenizer or input cannot be used, or the cache cannot be written.
    """
    place = _find(source, tokenizer, family, settings, cache_dir)
    entry = place.entry
    if overwrite:
        entry.discard(older_than=STARTED)
    manifest = entry.manifest()
    built = manifest is None
    if manifest is None:
        check_template(tokenizer, place.template, place.encoder)
        manifest = entry.build(progress)
    entry.tidy()
    entry.check_sizes(manifest)
    return _open(entry, manifest, built, source, place.template, family, settings)


def look_up(
    source: DataSource, tokenizer: Any, family: Family, settings: FeatureSettings, cache_dir: Path
) -> tuple[str, dict[str, int] | None]:
    """The fingerprint of the features that `prepare_features` would give, and their counts if the cache has them.

    Raises: UserError as `prepare_features`, except for what only reading the input shows.
    """
    place = _find(source, tokenizer, family, settings, cache_dir)
    manifest = place.entry.manifest()
    return place.fingerprint, None if manifest is None else manifest["counts"]


@dataclass(frozen=True)
class _Place:
    """Where features are, or will be, and what is needed to build them."""

    entry: CacheEntry
    fingerprint: str
    template: Template
    encoder: Encoder


def _find(source: DataSource, tokenizer: Any, family: Family, settings: FeatureSettings, cache_dir: Path) -> _Place:
    encoder = _LazyEncoder(tokenizer)
    template = find_template(tokenizer, family, encoder)
    check_settings(settings, template.special_tokens)
    work = _Work(source, encoder, template, settings)
    digests = InputDigests(Path(cache_dir))
    identities = [file_identity(Path(name)) for name in source.files]
    fingerprint = cache_key(digests.of(source.files), source, encoder.state, template, family, settings)
    work.identities = identities
    entry = CacheEntry(Path(cache_dir) / f"{source.purpose}-{fingerprint[:24]}", fingerprint, work)
    return _Place(entry, fingerprint, template, encoder)


class _Work:
    """What the entry's content is made by."""

    def __init__(self, source: DataSource, encoder: Encoder, template: Template, settings: FeatureSettings):
        self.identities: list[list[int]] = []
        self._source = source
        self._encoder = encoder
        self._template = template
        self._settings = settings
        self._report: ReadReport | None = None

    def example_shards(self) -> Iterator[dict[str, Column]]:
        report = ReadReport()
        yield from shards_of(read_examples(self._source, report))
        for name, identity in zip(self._source.files, self.identities, strict=True):
            if file_identity(Path(name)) != identity:
                raise UserError(f"{name}: changed while it was read; start again when it is complete")
        self._report = report

    def report(self) -> dict[str, Any]:
        assert self._report is not None, "the report is complete after the last shard"
        report = self._report.to_dict()
        # The entry serves the same content under other names too: rejected rows say which file, not what it is called.
        for row in report["rejected"]:
            row["file"], row["where"] = _file_and_place(row["where"], self._source.files)
        return report

    def features(self, examples: Columns) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        drop = self._source.purpose == "train" and not self._source.version_2_with_negative
        return build_features(examples, self._encoder, self._template.special_tokens, self._settings, drop)

    def index(self, shards: Iterator[tuple[int, Columns]]) -> dict[str, np.ndarray]:
        lengths, examples = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.int64)]
        for before, columns in shards:
            shard = FeatureShard(columns)
            lengths.append(shard.row_lengths(self._template.special_tokens))
            examples.append(shard.feature_example.astype(np.int64) + before)
        return {"lengths": np.concatenate(lengths), "example_index": np.concatenate(examples)}


class _LazyEncoder:
    """The encoder of a tokenizer, made when it is first used: a full cache needs none."""

    def __init__(self, tokenizer: Any):
        self.state = serialize(tokenizer) if tokenizer.is_fast else serialize_python(tokenizer)
        self._tokenizer = tokenizer
        self._encoder: Encoder | None = None

    def encode(self, texts: Sequence[str], offsets: bool) -> Tokens:
        if self._encoder is None:
            split = bool(getattr(self._tokenizer, "split_special_tokens", False))
            fast = self._tokenizer.is_fast
            self._encoder = FastEncoder(self.state, split) if fast else PythonEncoder(self._tokenizer)
        return self._encoder.encode(texts, offsets)


def _open(
    entry: CacheEntry,
    manifest: dict[str, Any],
    built: bool,
    source: DataSource,
    template: Template,
    family: Family,
    settings: FeatureSettings,
) -> FeatureStore:
    shards = manifest["shards"]
    opened: dict[int, Columns] = {}

    def examples(number: int) -> Columns:
        if number not in opened:
            opened[number] = entry.examples(number, shards[number]["examples"])
        return opened[number]

    def features(number: int) -> Columns:
        return entry.features(number, shards[number]["examples"], shards[number]["features"])

    def report() -> ReadReport:
        rejected = entry.rejected()
        for row in rejected:
            row["where"] = source.files[row.pop("file")] + row["where"]
        return ReadReport.from_dict({**manifest["report"], "rejected": rejected})

    return FeatureStore(
        fingerprint=manifest["fingerprint"],
        counts=manifest["counts"],
        built=built,
        report=report,
        template=template,
        sends_token_type_ids=family.sends_token_type_ids,
        all_answers=settings.answers == "all",
        shard_splits=splits_of(np.array([shard["features"]["features"] for shard in shards], dtype=np.int64)),
        index=entry.index(manifest),
        open_shard=features,
        examples=ExampleStore(
            splits_of(np.array([shard["examples"]["examples"] for shard in shards], dtype=np.int64)), examples
        ),
    )


def _file_and_place(where: str, files: Sequence[str]) -> tuple[int, str]:
    """The number of the file that `where` begins with, and the rest."""
    number = max((n for n, name in enumerate(files) if where.startswith(name + ":")), key=lambda n: len(files[n]))
    return number, where[len(files[number]) :]
