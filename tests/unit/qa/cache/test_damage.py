"""Damage to the small files of the cache costs a rebuild and one line; --overwrite_cache goes by no clock."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qa_deepspeed.qa.cache import entry as entry_module
from qa_deepspeed.qa.cache import key
from qa_deepspeed.qa.cache import prepare as prepare_module
from qa_deepspeed.qa.cache.prepare import prepare_features
from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.data.reading import DataSource
from qa_deepspeed.qa.features import example_store
from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.utils.json_files import CHECKSUM
from tests.unit import small_tokenizers
from tests.unit.damage import DAMAGE
from tests.unit.reference_features import write_squad

SETTINGS = FeatureSettings(max_seq_length=48, doc_stride=16, max_query_length=16)
FINISHED = ("manifest.json", "rejected.json")
IN_WORK = ("reading.json", "examples-00000.json", "examples-00002.json", "features-00001.json")
OTHER_VALUES = ["", "[]", "5", "null", "{}", '{"fingerprint": 1}']
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_store, "SMALL_SHARD", 8)
    monkeypatch.setattr(key, "SETTLED_SECONDS", -1.0)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """24 questions of three shards, and one that is rejected."""
    examples = [Example(f"q{n}", "what?", f"the answer is {n}", (Answer("answer", 4),)) for n in range(24)]
    bad = Example("bad", "where?", "Here.", (Answer("There", 0),))
    return Path(write_squad(tmp_path / "data.json", [*examples, bad]))


def prepare(data: Path, cache: Path, overwrite: str | None = None) -> FeatureStore:
    source = DataSource((str(data),), "train", False)
    tokenizer, family = small_tokenizers.tokenizer("bert"), small_tokenizers.family("bert")
    return prepare_features(source, tokenizer, family, SETTINGS, cache, overwrite=overwrite, timeout_seconds=20)


def entry_of(cache: Path) -> Path:
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return folder


def contents(cache: Path) -> dict[str, bytes]:
    """What a finished entry keeps."""
    return {path.name: path.read_bytes() for path in entry_of(cache).iterdir() if path.suffix in (".arrow", ".json")}


def same(store: FeatureStore, data: Path, cache: Path, wanted: dict[str, bytes]) -> None:
    """The store has what a fresh build has, and so has its folder."""
    assert store.counts["examples"] == 24 and len(store) == 24
    (row,) = store.report.rejected
    assert row.example_id == "bad" and row.where.startswith(f"{data}:")
    assert contents(cache) == wanted


def kill_before(name: str) -> None:
    """Make this process kill itself before it writes this file of an entry."""
    write = entry_module.write_bytes

    def counted(path: Path, content: Any) -> None:
        if path.name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)

    entry_module.write_bytes = counted


@pytest.fixture
def half_built(data: Path, tmp_path: Path) -> Path:
    """A cache whose builder was killed with all shards complete and no manifest."""

    def build() -> None:
        kill_before("manifest.json")
        prepare(data, tmp_path / "half")

    builder = fork.Process(target=build)
    builder.start()
    builder.join(60)
    assert builder.exitcode == -signal.SIGKILL
    return tmp_path / "half"


@pytest.mark.parametrize("value", OTHER_VALUES)
@pytest.mark.parametrize("name", [*FINISHED, "digests.json"])
def test_another_value_in_a_file_costs_a_rebuild_and_one_line(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture, name: str, value: str
) -> None:
    cache = tmp_path / "cache"
    prepare(data, cache)
    wanted = contents(cache)
    path = cache / name if name == "digests.json" else entry_of(cache) / name
    path.write_text(value)
    with caplog.at_level(logging.WARNING):
        store = prepare(data, cache)
        same(store, data, cache, wanted)
    assert store.built == (name == "manifest.json")
    if (name, value) != ("digests.json", "{}"):
        assert len([line for line in caplog.messages if name in line]) == 1, caplog.messages
    caplog.clear()
    assert not prepare(data, cache).built and not caplog.messages, "it is whole again"


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=DAMAGE, name=st.sampled_from([*FINISHED, "digests.json"]))
def test_no_damage_of_a_finished_entry_matters(
    tmp_path: Path, data: Path, damage: Callable[[bytes], bytes], name: str
) -> None:
    cache = tmp_path / "cache"
    if not (tmp_path / "whole").exists():
        prepare(data, tmp_path / "whole")
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(tmp_path / "whole", cache)
    wanted = contents(tmp_path / "whole")
    path = cache / name if name == "digests.json" else entry_of(cache) / name
    path.write_bytes(damage(path.read_bytes()))
    store = prepare(data, cache)
    assert store.report.rejected, "a damaged list is made again when it is read"
    if name in FINISHED:  # perhaps only white space has changed, or the name of the checksum
        was, found = (json.loads(files[name]) for files in (wanted, contents(cache)))
        was.pop(CHECKSUM, None)
        assert {key: found[key] for key in was} == was
    same(store, data, cache, {**wanted, name: contents(cache)[name]} if name in FINISHED else wanted)


@pytest.mark.distributed
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=DAMAGE, names=st.sets(st.sampled_from([*IN_WORK, "rejected.json"]), min_size=1, max_size=3))
def test_no_damage_of_an_entry_in_work_matters(
    tmp_path: Path, data: Path, half_built: Path, damage: Callable[[bytes], bytes], names: set[str]
) -> None:
    if not (tmp_path / "whole").exists():
        prepare(data, tmp_path / "whole")
    cache = tmp_path / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(half_built, cache)
    for name in names:
        path = entry_of(cache) / name
        path.write_bytes(damage(path.read_bytes()))
    store = prepare(data, cache)
    assert store.built
    assert store.report.rejected, "a damaged list is made again when it is read"
    wanted = contents(tmp_path / "whole")
    assert json.loads(contents(cache)["rejected.json"]) == json.loads(wanted["rejected.json"])
    same(store, data, cache, {**wanted, "rejected.json": contents(cache)["rejected.json"]})


def test_counts_that_were_altered_are_not_believed(tmp_path: Path, data: Path) -> None:
    prepare(data, tmp_path / "cache")
    path = entry_of(tmp_path / "cache") / "manifest.json"
    path.write_text(path.read_text().replace('"examples": 24', '"examples": 42'))
    store = prepare(data, tmp_path / "cache")
    assert store.built and store.counts["examples"] == 24


def test_an_entry_without_checksums_opens(tmp_path: Path, data: Path) -> None:
    """As versions before wrote it."""
    cache = tmp_path / "cache"
    prepare(data, cache)
    path = entry_of(cache) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[CHECKSUM], manifest["rejected"]
    path.write_text(json.dumps(manifest))
    digests = json.loads((cache / "digests.json").read_text())
    del digests[CHECKSUM]
    (cache / "digests.json").write_text(json.dumps(digests))
    store = prepare(data, cache)
    assert not store.built and [one.example_id for one in store.report.rejected] == ["bad"]


def test_an_altered_list_of_rejected_questions_is_read_from_the_input_again(tmp_path: Path, data: Path) -> None:
    cache = tmp_path / "cache"
    prepare(data, cache)
    path, wanted = entry_of(cache) / "rejected.json", contents(cache)
    path.write_text(path.read_text().replace("bad", "mad"))
    store = prepare(data, cache)
    assert not store.built
    same(store, data, cache, wanted)


# ---- --overwrite_cache ----


@pytest.mark.parametrize("seconds", [-1e6, 0, 1e6])
def test_overwriting_goes_by_no_clock(tmp_path: Path, data: Path, seconds: float) -> None:
    """Times in the future come from a clock that was set back, or a file server's that is ahead."""
    cache = tmp_path / "cache"
    prepare(data, cache)
    wanted = contents(cache)
    for path in cache.rglob("*"):
        os.utime(path, (time.time() + seconds,) * 2)
    assert prepare(data, cache, overwrite="one run").built
    assert not prepare(data, cache, overwrite="one run").built, "another rank of the run"
    assert not prepare(data, cache).built
    assert prepare(data, cache, overwrite="the next run").built
    assert contents(cache) == wanted


@pytest.mark.distributed
def test_ranks_that_overwrite_build_together(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard once, whatever was there before, with a builder of another run beside them."""
    cache, log = tmp_path / "cache", tmp_path / "log"
    prepare(data, cache)
    wanted = contents(cache)
    build = prepare_module.build_features

    def logged(examples: Any, *rest: Any) -> Any:
        with open(log, "a") as handle:
            handle.write(f"{examples.strings('example_ids')[0].as_py()}\n")
        time.sleep(0.1)
        return build(examples, *rest)

    monkeypatch.setattr(prepare_module, "build_features", logged)
    ranks = [fork.Process(target=prepare, args=(data, cache, token)) for token in ("one", "one", None)]
    for rank in ranks[:2]:
        rank.start()
    while not (entry_of(cache) / entry_module.OVERWRITTEN).exists():
        time.sleep(0.01)
    ranks[2].start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert sorted(log.read_text().split()) == ["q0", "q16", "q8"]
    assert contents(cache) == wanted


@pytest.mark.distributed
def test_runs_that_overwrite_at_once_both_finish(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    prepare(data, cache)
    wanted = contents(cache)
    build = prepare_module.build_features

    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        return build(*arguments)

    monkeypatch.setattr(prepare_module, "build_features", slow)

    def delayed(token: str, seconds: float) -> None:
        time.sleep(seconds)
        assert prepare(data, cache, token).counts["examples"] == 24

    runs = [fork.Process(target=delayed, args=(f"run {n}", 0.06 * n)) for n in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0] * 4
    same(prepare(data, cache), data, cache, wanted)
