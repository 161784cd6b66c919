"""Golden tests of the cache: features and keys of fixed input, as recorded for `FORMAT_VERSION`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from qa_deepspeed.qa.cache import key
from qa_deepspeed.qa.cache.key import FORMAT_VERSION, cache_key
from qa_deepspeed.qa.cache.prepare import prepare_features
from qa_deepspeed.qa.data.reading import ColumnNames, DataSource
from qa_deepspeed.qa.features import example_store
from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.qa.features.families import Family
from qa_deepspeed.qa.features.template import Special, Template
from tests.unit import small_tokenizers
from tests.unit.qa.features import test_slow_tokenizers as small_slow_tokenizers

# ---- features ----

GOLDEN_FEATURES: dict[tuple[int, int], dict[str, str]] = {
    (1, 2): {
        "bert": "550ba5cffaa02b65683abb89faccac0de1fb2d77258ae3fb633886bf85fc82c9",
        "roberta": "68d41f2920139fc9562123509fa384c209b34fb92c719195495f7b975801fe7d",
        "llama": "3e88eb88ed1ba4d8eb89f94a4c47fa366d14d3f115729e72a7d5311adfc585e3",
        "xlnet": "31c661a6c909bcb9c3997193498d2179d66ab4918fb7a1703988dac9201ee4ab",
        "t5": "2614e5e9611078563fdabd02fe084993fd83eed682ba87234fcf3302a1290f9f",
        "gpt2": "f4b0c42d6308c84ce878c13d17f0d35e3a78ddaac1c1f1d47e2a8f1451a0528c",
        "deberta-v2": "8a6c7ce9cfc0f39d9c9ae03abc2c2f9ac65f450934620677efa91f7f77f1e73b",
        "modernbert": "7320485d2cf999e531c4b79b136bad254a1a102a5ab86ff7acb3ce03fe324b68",
        "prophetnet": "1344142dc0ad470f5ae12201d7f559229226deb520ccac310f0cce37add2f6f3",
        "phobert": "e6fd4d88f2b3718f1dc15c70326214fb57f855757a427d63b9d82f837357d642",
        "byt5": "50bf4a86038d866753f0747cb76bafb215da37ff4b6d6cb5c732027dba0995b3",
    },
}
"""Versions (train, evaluate) -> tokenizer -> digest of what the cache holds of `document()`.

Keep the rows of older versions. Those of (1, 1) are the same: `document()` has gold answers to all questions.
"""

SLOW = ("prophetnet", "phobert", "byt5")
FAST = ("bert", "roberta", "llama", "xlnet", "t5", "gpt2", "deberta-v2", "modernbert")

SHARD_SIZES = (
    example_store.FIRST_SHARDS,
    example_store.SMALL_SHARD,
    example_store.LARGE_SHARD,
    example_store.SHARD_CHARACTERS,
)


def document(version_2: bool) -> dict[str, Any]:
    """SQuAD JSON: contexts of several windows, several answers, a repaired one, none, and questions to reject."""
    sentences = small_tokenizers.SENTENCES
    contexts = [f"{sentences[number]} {sentences[number - 1]}" for number in range(len(sentences))]
    paragraphs = []
    for number, context in enumerate([*contexts, contexts[0], " ", "It is short."]):
        words = context.split()
        answers = [_answer(context, word) for word in words[number % 3 :: 5]]
        questions = [
            {"id": f"{number}-all", "question": f"Which words, {number}?", "answers": answers},
            {"id": f"{number}-last", "question": sentences[1], "answers": answers[-1:]},
            {
                "id": f"{number}-repaired",
                "question": "What?",
                "answers": [_answer(context, one, 2) for one in words[:1]],
            },
            {"id": f"{number}-absent", "question": "Who?", "answers": [{"text": "absent", "answer_start": 1}]},
            {"id": f"{number}-all", "question": "Is the id new?", "answers": answers},
        ]
        if version_2:
            questions.append({"id": f"{number}-none", "question": "What?", "answers": [], "is_impossible": True})
        paragraphs.append({"context": context, "qas": questions})
    return {"version": "2.0" if version_2 else "1.1", "data": [{"title": "golden", "paragraphs": paragraphs}]}


def _answer(context: str, word: str, shift: int = 0) -> dict[str, Any]:
    return {"text": word, "answer_start": context.index(word) + shift}


CASES: dict[str, tuple[dict[str, Any], FeatureSettings]] = {
    "train": (
        {"purpose": "train", "version_2_with_negative": True},
        FeatureSettings(max_seq_length=60, doc_stride=16, max_query_length=24),
    ),
    "train on some, few windows": (
        {"purpose": "train", "version_2_with_negative": False, "max_examples": 20, "seed": 7},
        FeatureSettings(60, 8, "overlap", 24, "all", "sample"),
    ),
    "evaluate": (
        {"purpose": "evaluate", "version_2_with_negative": True},
        FeatureSettings(60, 8, "overlap", 24, "all"),
    ),
}


def entry_digest(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """SHA-256 of all that the entries of a tokenizer hold, for every case."""
    monkeypatch.setattr(example_store, "SMALL_SHARD", 16)
    slow = name in SLOW
    tokenizer = small_slow_tokenizers.tokenizer(name) if slow else small_tokenizers.tokenizer(name)
    family = small_slow_tokenizers.family(name) if slow else small_tokenizers.family(name)
    digest = hashlib.sha256(repr(SHARD_SIZES).encode())
    for case, (changes, settings) in CASES.items():
        data, cache = folder / f"{case}.json", folder / case
        data.write_text(json.dumps(document(changes["version_2_with_negative"])), encoding="utf-8")
        source = DataSource(files=(str(data),), **changes)
        prepare_features(source, tokenizer, family, settings, cache)
        (entry,) = (path for path in cache.iterdir() if path.is_dir())
        digest.update(case.encode())
        for path in sorted(entry.glob("*.arrow")):
            digest.update(path.name.encode())
            _add_columns(digest, path)
        digest.update(json.dumps(_lasting(json.loads((entry / "manifest.json").read_text()))).encode())
        rejected = entry / "rejected.json"
        digest.update(_without_words(rejected.read_bytes()) if rejected.exists() else b"none")
    return digest.hexdigest()


def _without_words(content: bytes) -> bytes:
    """rejected.json without the details, which are words, and without the file's number, which earlier versions did not
    write."""
    found = json.loads(content)
    kept = ("example_id", "where", "reason")
    found["rejected"] = [{name: one[name] for name in kept} for one in found["rejected"]]
    return json.dumps(found).encode()


def _add_columns(digest: Any, path: Path) -> None:
    with pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            digest.update(f"{name} {column.type} {column.values.to_pylist()}\n".encode())


def _lasting(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest without what depends on the key and on the version of the library that writes Arrow files, and
    without the checksums of JSON files, which version 0.1 did not write."""
    marks = [manifest["index"], *(mark for shard in manifest["shards"] for mark in shard.values())]
    for mark in marks:
        mark.update(size=0, checksum="")
    kept = {name: value for name, value in manifest.items() if name not in ("rejected", "json_checksum")}
    return {**kept, "fingerprint": ""}


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_features_are_those_of_the_format_version(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = entry_digest(name, tmp_path, monkeypatch)
    versions = (FORMAT_VERSION["train"], FORMAT_VERSION["evaluate"])
    assert GOLDEN_FEATURES.get(versions, {}).get(name) == found, (
        f"what the cache holds for {name} is not what was recorded for FORMAT_VERSION {FORMAT_VERSION}: if the change "
        f"is meant, raise FORMAT_VERSION in qa/cache/key.py and record {found!r} under the new version; if only the "
        "version of a library or the input of this test changed, record it under the present one"
    )


# ---- keys ----

SOURCE = DataSource(
    files=("one.json", "two.json"),
    purpose="train",
    version_2_with_negative=True,
    max_examples=100,
    seed=7,
    columns=ColumnNames("key", "asked", "text", "gold", "none"),
)
SETTINGS = FeatureSettings(200, 50, "overlap", 30, "all", "sample")
FAMILY = Family("bert", False, "cls", "right", True, False, 0, 0)
TEMPLATE = Template(Special((1,), (0,)), Special((2, 2), (0, 1)), Special((2,), (1,)), 0, 1, False, True, 0)

GOLDEN_KEYS = {
    "train": "125d261765b595c7290bfb66c64c03c45646341fc5601345d3557fe5b40440a5",
    "train on all": "d633f96b04c262062ff3d6c1dc29d890d2a942477fe4aeb3a2ba11374766e1f2",
    "evaluate": "29c4dabe811e6febee827aa7f0cafcafd4188a0e65cedce71b323572c0ce93f0",
    "without type ids": "4f1bb80ca89bcc17498af5bcac07c8fee93ffe9caaf545ba49b1ea00b7587512",
}
"""Keys that the first release gave to this input, under FORMAT_VERSION 1."""


@pytest.mark.parametrize("case", GOLDEN_KEYS)
def test_keys_are_those_of_the_first_release(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of fields of DataSource, FeatureSettings and Template enter the key: renaming one loses every cache."""
    monkeypatch.setattr(key, "FORMAT_VERSION", {"train": 1, "evaluate": 1})
    source, family = SOURCE, FAMILY
    if case == "train on all":
        source = replace(SOURCE, max_examples=None)
    elif case == "evaluate":
        source = replace(SOURCE, purpose="evaluate")
    elif case == "without type ids":
        family = replace(FAMILY, sends_token_type_ids=False)
    assert cache_key(["aa", "bb"], source, "state \ud800", TEMPLATE, family, SETTINGS) == GOLDEN_KEYS[case]


def test_another_version_has_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for version in (1, 2, 3):
        monkeypatch.setattr(key, "FORMAT_VERSION", {"train": version, "evaluate": 9})
        keys.add(cache_key(["aa"], SOURCE, "state", TEMPLATE, FAMILY, SETTINGS))
    assert len(keys) == 3
