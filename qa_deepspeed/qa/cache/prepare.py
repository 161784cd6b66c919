"""Features of a source, read from the cache or built into it. Training and evaluation get all features here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qa_deepspeed.qa.cache.entry import CacheEntry, ProgressCallback
from qa_deepspeed.qa.cache.key import InputDigests, cache_key, file_identity
from qa_deepspeed.qa.data.files import distinct_names
from qa_deepspeed.qa.data.reading import DataSource, ReadReport, read_examples
from qa_deepspeed.qa.features.arrow import ArrowFile, Column
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


def prepare_features(
    source: DataSource,
    tokenizer: Any,
    family: Family,
    settings: FeatureSettings,
    cache_dir: Path,
    *,
    overwrite: str | None = None,
    progress: ProgressCallback | None = None,
    timeout_seconds: float = math.inf,
) -> FeatureStore:
    """The features of a source, built into `cache_dir` unless they exist.

    Any number of processes, on one file system or several, may call this at once: they divide the work by file locks
    and need no other communication.

    Args:
        overwrite: a token that the ranks of one run have in common: what the cache has is built again, once for it.
        timeout_seconds: how long another builder may leave the entry as it is while this process waits for it.
        progress: called with the number of examples done and of all examples (None while that is unknown).
    Raises:
        UserError: settings, tokenizer or input cannot be used, the cache cannot be written, or another builder hangs.
    """
    lookup = _find_entry(source, tokenizer, family, settings, cache_dir, timeout_seconds)
    entry = lookup.entry
    if overwrite is not None:
        entry.discard(overwrite)
    manifest = entry.manifest()
    built = manifest is None
    if manifest is None:
        check_template(tokenizer, lookup.template, lookup.encoder)
        manifest = entry.build(progress)
    entry.remove_leftovers()
    entry.repair_sizes(manifest)
    return _open(entry, manifest, built, source, lookup.template, family, settings)


def look_up(
    source: DataSource, tokenizer: Any, family: Family, settings: FeatureSettings, cache_dir: Path
) -> tuple[str, dict[str, int] | None]:
    """The fingerprint of the features that `prepare_features` returns, and their counts if the cache has them.

    Builds nothing. Raises: UserError as `prepare_features`, except for errors in the content of the input.
    """
    lookup = _find_entry(source, tokenizer, family, settings, cache_dir)
    manifest = lookup.entry.manifest()
    return lookup.fingerprint, None if manifest is None else manifest["counts"]


def look_up_rows_by_file(
    source: DataSource, tokenizer: Any, family: Family, settings: FeatureSettings, cache_dir: Path
) -> np.ndarray:
    """`FeatureStore.rows_by_file` of features that the cache has, by `look_up`. Raises: UserError as there."""
    lookup = _find_entry(source, tokenizer, family, settings, cache_dir)
    manifest = lookup.entry.manifest()
    assert manifest is not None, "look_up has found the features"
    return _open(lookup.entry, manifest, False, source, lookup.template, family, settings).rows_by_file


@dataclass(frozen=True)
class _Lookup:
    """The cache entry of a source, complete or not, and what building it needs."""

    entry: CacheEntry
    fingerprint: str
    template: Template
    encoder: Encoder


def _find_entry(
    source: DataSource,
    tokenizer: Any,
    family: Family,
    settings: FeatureSettings,
    cache_dir: Path,
    timeout_seconds: float = math.inf,
) -> _Lookup:
    encoder = _LazyEncoder(tokenizer)
    template = find_template(tokenizer, family, encoder)
    check_settings(settings, template.special_tokens)
    # Before the digests are computed, so that a change in between is found.
    identities = [file_identity(Path(name)) for name in source.files]
    digests = InputDigests(cache_dir).of(source.files)
    fingerprint = cache_key(digests, source, encoder.state, template, family, settings)
    content = _Content(source, identities, encoder, template, settings)
    entry = CacheEntry(cache_dir / f"{source.purpose}-{fingerprint[:24]}", fingerprint, content, timeout_seconds)
    return _Lookup(entry, fingerprint, template, encoder)


class _Content:
    """Builds what the entry holds from the source."""

    def __init__(
        self,
        source: DataSource,
        identities: list[list[int]],
        encoder: Encoder,
        template: Template,
        settings: FeatureSettings,
    ):
        self._source = source
        self._identities = identities
        self._encoder = encoder
        self._template = template
        self._settings = settings
        self._report: ReadReport | None = None

    def example_shards(self) -> Iterator[dict[str, Column]]:
        report = ReadReport()
        yield from shards_of(read_examples(self._source, report))
        for name, identity in zip(self._source.files, self._identities, strict=True):
            if file_identity(Path(name)) != identity:
                raise UserError(f"{name}: changed while it was read; start again when it is complete")
        self._report = report

    def report(self) -> dict[str, Any]:
        assert self._report is not None, "the report is complete after the last shard"
        report = self._report.to_dict()
        # The same content under other file names has the same entry: rejected rows hold the number of the file.
        for row in report["rejected"]:
            row["file"], row["where"] = _file_and_place(row["where"], self._source.files)
        return report

    def features(self, examples: ArrowFile) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        drop = self._source.purpose == "train" and not self._source.version_2_with_negative
        return build_features(examples, self._encoder, self._template.special_tokens, self._settings, drop)

    def index(self, shards: Iterator[tuple[int, ArrowFile]]) -> dict[str, np.ndarray]:
        lengths, examples = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.int64)]
        for before, columns in shards:
            shard = FeatureShard(columns)
            lengths.append(shard.row_lengths(self._template.special_tokens))
            examples.append(shard.feature_example.astype(np.int64) + before)
        return {"lengths": np.concatenate(lengths), "example_index": np.concatenate(examples)}


class _LazyEncoder:
    """The encoder of a tokenizer, created at its first use: a complete cache needs none."""

    def __init__(self, tokenizer: Any):
        self.state = serialize(tokenizer) if tokenizer.is_fast else serialize_python(tokenizer)
        self._tokenizer = tokenizer
        self._encoder: Encoder | None = None

    def encode(self, texts: Sequence[str], offsets: bool) -> Tokens:
        if self._encoder is None:
            kind = FastEncoder if self._tokenizer.is_fast else PythonEncoder
            self._encoder = kind(self._tokenizer)
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
    opened: dict[int, ArrowFile] = {}

    def examples(number: int) -> ArrowFile:
        if number not in opened:
            opened[number] = entry.examples(number, shards[number]["examples"])
        return opened[number]

    def features(number: int) -> ArrowFile:
        return entry.features(number, shards[number]["examples"], shards[number]["features"])

    def report() -> ReadReport:
        rejected = entry.rejected(manifest)
        files = dict(enumerate(source.files))
        for row in rejected:
            row["where"] = files.get(row.pop("file"), "?") + row["where"]
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
        files=distinct_names(source.files) if source.by_file else (),
        examples_by_file=manifest["report"].get("examples_by_file", ()),
    )


def _file_and_place(where: str, files: Sequence[str]) -> tuple[int, str]:
    """The number of the file whose name `where` begins with (the longest), and the rest of `where`."""
    number = max((n for n, name in enumerate(files) if where.startswith(name + ":")), key=lambda n: len(files[n]))
    return number, where[len(files[number]) :]
