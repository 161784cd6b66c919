"""The input is read in a thread while features are built; its errors end the build."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qa_deepspeed.qa.cache import prepare as prepare_module
from qa_deepspeed.qa.cache.background import BackgroundCall
from qa_deepspeed.qa.cache.prepare import prepare_features
from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.data.reading import DataSource
from qa_deepspeed.qa.features import example_store
from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.utils.errors import UserError
from tests.unit import small_tokenizers
from tests.unit.reference_features import write_squad

SETTINGS = FeatureSettings(max_seq_length=48, doc_stride=16, max_query_length=16)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(example_store, "SMALL_SHARD", 8)
    examples = [Example(f"q{n}", "what?", f"the answer is {n}", (Answer("answer", 4),)) for n in range(40)]
    return Path(write_squad(tmp_path / "data.json", examples))


def prepare(data: Path, cache: Path) -> FeatureStore:
    tokenizer, family = small_tokenizers.tokenizer("bert"), small_tokenizers.family("bert")
    return prepare_features(DataSource((str(data),), "evaluate", False), tokenizer, family, SETTINGS, cache)


def test_features_are_built_before_reading_ends(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = prepare_module._Content.example_shards

    def waiting(content: Any) -> Iterator[Any]:
        for number, shard in enumerate(shards(content)):
            ends = time.monotonic() + 30
            while number > 1 and not list(tmp_path.rglob(f"features-{number - 2:05d}.json")):
                assert time.monotonic() < ends, "no features are built while the input is read"
                time.sleep(0.01)
            yield shard

    monkeypatch.setattr(prepare_module._Content, "example_shards", waiting)
    assert prepare(data, tmp_path / "cache").counts["examples"] == 40
    assert prepare(data, tmp_path / "other").counts["examples"] == 40


def test_an_error_of_reading_ends_the_build_and_no_thread_stays(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = prepare_module._Content.example_shards

    def broken(content: Any) -> Iterator[Any]:
        for number, shard in enumerate(shards(content)):
            if number == 2:
                raise UserError("line 17: broken")
            yield shard

    monkeypatch.setattr(prepare_module._Content, "example_shards", broken)
    threads = threading.active_count()
    with pytest.raises(UserError, match="line 17: broken"):
        prepare(data, tmp_path / "cache")
    assert threading.active_count() == threads


def test_an_error_of_the_features_ends_reading(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, read = prepare_module._Content.example_shards, []

    def slow(content: Any) -> Iterator[Any]:
        for number, shard in enumerate(shards(content)):
            read.append(number)
            yield shard
            time.sleep(0.5)

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(prepare_module._Content, "example_shards", slow)
    monkeypatch.setattr(prepare_module._Content, "features", broken)
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        prepare(data, tmp_path / "cache")
    assert threading.active_count() == threads and len(read) < 5


def test_a_call_reports_whether_it_did_something() -> None:
    results = iter([True, False])
    background = BackgroundCall(lambda check: next(results))
    assert not background.wait(0)
    for expected in (True, False):
        background.start()
        while background.running():
            time.sleep(0.001)
        assert [background.wait(0), background.wait(0)] == [expected, False]
