"""A builder that is stopped while it holds a lock: the others say what they wait for, and give up in time."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qa_deepspeed.qa.cache import prepare as prepare_module
from qa_deepspeed.qa.cache import waiting
from qa_deepspeed.qa.cache.prepare import prepare_features
from qa_deepspeed.qa.cache.waiting import Locks
from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.data.reading import DataSource
from qa_deepspeed.qa.features import example_store
from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.utils.errors import LostRankError
from tests.unit import small_tokenizers
from tests.unit.reference_features import write_squad

SETTINGS = FeatureSettings(max_seq_length=48, doc_stride=16, max_query_length=16)
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_store, "SMALL_SHARD", 8)
    monkeypatch.setattr(waiting, "NOTICE_SECONDS", 0.2)
    monkeypatch.setattr(waiting, "SCAN_SECONDS", 0.05)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    examples = [Example(f"q{n}", "what?", f"the answer is {n}", (Answer("answer", 4),)) for n in range(40)]
    return Path(write_squad(tmp_path / "data.json", examples))


def prepare(data: Path, cache: Path, timeout_seconds: float) -> FeatureStore:
    source = DataSource((str(data),), "evaluate", False)
    tokenizer, family = small_tokenizers.tokenizer("bert"), small_tokenizers.family("bert")
    return prepare_features(source, tokenizer, family, SETTINGS, cache, timeout_seconds=timeout_seconds)


@pytest.fixture
def stopped(data: Path, tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """Starts a builder that stops itself (SIGSTOP) inside a method of the entry's content; returns its process id."""
    builders: list[multiprocessing.process.BaseProcess] = []

    def start(method: str) -> int:
        def build() -> None:
            def stop(*_: object) -> None:
                os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(600)  # the signal may reach another thread first

            setattr(prepare_module._Content, method, stop)
            prepare(data, tmp_path / "cache", 60)

        builder = fork.Process(target=build)
        builder.start()
        builders.append(builder)
        assert builder.pid is not None
        while "State:\tT" not in Path(f"/proc/{builder.pid}/status").read_text():
            time.sleep(0.01)
        return builder.pid

    yield start
    for builder in builders:
        builder.kill()
        builder.join()


@pytest.mark.parametrize(
    ("method", "lock"), [("example_shards", "reading"), ("features", "features-00000"), ("index", "manifest")]
)
def test_the_lock_and_its_holder_are_named(
    data: Path, tmp_path: Path, stopped: Callable[[str], int], caplog: pytest.LogCaptureFixture, method: str, lock: str
) -> None:
    holder = stopped(method)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(LostRankError) as error:
        prepare(data, tmp_path / "cache", 1)
    assert 1 <= time.monotonic() - began < 10
    assert f"waiting for {lock}.lock (held by process {holder} on " in str(error.value)
    assert f"waiting for {lock}.lock (held by process {holder} on " in caplog.text
    os.kill(holder, signal.SIGKILL)
    assert prepare(data, tmp_path / "cache", 1).counts["examples"] == 40
    assert not [path.name for path in (tmp_path / "cache").rglob("*.holder")]


def test_a_wait_for_one_lock_is_bounded(tmp_path: Path) -> None:
    message = f"one.lock .held by process {os.getpid()} on"
    with Locks(tmp_path).lock("one"), pytest.raises(LostRankError, match=message), Locks(tmp_path, 0.3).lock("one"):
        pass
    with Locks(tmp_path, 0.3).lock("one"):
        assert len(list(tmp_path.glob("*.lock"))) == 1


def test_a_builder_that_makes_progress_is_waited_for(tmp_path: Path) -> None:
    locks, file = Locks(tmp_path, 0.5), tmp_path / "growing.tmp"
    began = time.monotonic()
    while time.monotonic() - began < 1.5:
        file.write_bytes(b"x" * (1 + int(100 * (time.monotonic() - began))))
        locks.wait()
    with pytest.raises(LostRankError, match="no progress"):
        while True:
            locks.wait()
