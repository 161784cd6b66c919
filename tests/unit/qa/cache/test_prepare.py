"""The cache: when it misses and hits, many builders at once, builders killed, files damaged, disks that refuse."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertTokenizer

from qa_deepspeed.qa.cache import entry, key
from qa_deepspeed.qa.cache import prepare as prepare_module
from qa_deepspeed.qa.cache.prepare import prepare_features
from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.data.reading import DataSource
from qa_deepspeed.qa.features import arrow, example_store
from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.utils.errors import UserError
from tests.unit import small_tokenizers
from tests.unit.reference_features import write_squad

SETTINGS = FeatureSettings(max_seq_length=48, doc_stride=16, max_query_length=16)
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_store, "SMALL_SHARD", 8)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def corpus(count: int = 60, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    words = " ".join(small_tokenizers.SENTENCES).split()
    found = []
    for number in range(count):
        if number % 4 == 0:
            context = " ".join(rng.choices(words, k=rng.randint(5, 60))) + f" {number}"
        start = rng.randrange(len(context) - 1)
        answer = context[start : start + 9].strip()
        answers = (Answer(answer, context.index(answer)),) if answer else ()
        found.append(Example(f"q{number}", f"what is {number}?", context, answers))
    return found


def prepare(path: Path, cache: Path, **changes: Any) -> FeatureStore:
    settings = changes.pop("settings", SETTINGS)
    tokenizer = changes.pop("tokenizer", small_tokenizers.tokenizer("bert"))
    source = DataSource(
        (str(path),), changes.pop("purpose", "evaluate"), changes.pop("version_2_with_negative", False), **changes
    )
    return prepare_features(source, tokenizer, small_tokenizers.family("bert"), settings, cache)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return Path(write_squad(tmp_path / "data.json", corpus()))


def files_of(folder: Path) -> dict[str, bytes]:
    """Name and bytes of every file that a finished entry keeps."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix in (".arrow", ".json")}


def only_entry(cache: Path) -> Path:
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return folder


def rows(store: FeatureStore) -> list[list[int]]:
    taken = store.take(np.arange(len(store)))
    return [taken.input_ids.tolist(), taken.row_splits.tolist(), taken.start.tolist(), taken.end.tolist()]


# ---- what misses and what hits ----

CHANGES: dict[str, dict[str, Any]] = {
    "stride": {"settings": FeatureSettings(max_seq_length=48, doc_stride=15, max_query_length=16)},
    "meaning of stride": {
        "settings": FeatureSettings(max_seq_length=48, doc_stride=16, max_query_length=16, doc_stride_is="overlap")
    },
    "length": {"settings": FeatureSettings(max_seq_length=49, doc_stride=16, max_query_length=16)},
    "query length": {"settings": FeatureSettings(max_seq_length=48, doc_stride=16, max_query_length=15)},
    "answers": {"settings": FeatureSettings(max_seq_length=48, doc_stride=16, max_query_length=16, answers="all")},
    "version flag": {"version_2_with_negative": True},
    "purpose": {"purpose": "train"},
    "number of examples": {"max_examples": 50},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_any_setting_misses(tmp_path: Path, data: Path, change: str) -> None:
    first = prepare(data, tmp_path / "cache")
    second = prepare(data, tmp_path / "cache", **CHANGES[change])
    assert first.built and second.built and first.fingerprint != second.fingerprint
    assert not prepare(data, tmp_path / "cache", **CHANGES[change]).built
    assert not prepare(data, tmp_path / "cache").built


def test_a_change_of_the_data_misses_even_under_the_same_name_size_and_time(
    tmp_path: Path, data: Path, monkeypatch
) -> None:
    monkeypatch.setattr(key, "SETTLED_SECONDS", -1.0)
    prepare(data, tmp_path / "cache")
    status = data.stat()
    data.write_bytes(data.read_bytes().replace(b"what is 3?", b"what is 4?"))
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert data.stat().st_size == status.st_size
    assert prepare(data, tmp_path / "cache").built


def test_a_change_of_the_tokenizer_misses(tmp_path: Path, data: Path) -> None:
    prepare(data, tmp_path / "cache")
    vocabulary = small_tokenizers.tokenizer("bert").get_vocab()
    cased = BertTokenizer(vocab=vocabulary, do_lower_case=False)
    added = BertTokenizer(vocab=vocabulary)
    assert not prepare(data, tmp_path / "cache", tokenizer=added).built
    added.add_tokens(["Graubünden"])
    fewer = BertTokenizer(vocab={word: number for word, number in vocabulary.items() if number < len(vocabulary) - 1})
    assert all(prepare(data, tmp_path / "cache", tokenizer=one).built for one in (cased, added, fewer))


def test_what_cannot_matter_hits(tmp_path: Path, data: Path) -> None:
    first = prepare(data, tmp_path / "cache")
    elsewhere = Path(shutil.copy(data, tmp_path / "copy.json"))
    tokenizer = small_tokenizers.tokenizer("bert")
    tokenizer("a", "b", truncation="only_second", max_length=8, padding="max_length")  # leaves both switched on inside
    for path, changes in ((data, {}), (elsewhere, {}), (data, {"seed": 7})):
        again = prepare(path, tmp_path / "cache", **changes)
        assert not again.built and again.fingerprint == first.fingerprint
        assert rows(again) == rows(first)
        assert again.counts == first.counts and again.report == first.report
        assert again.examples.ids == first.examples.ids and list(again.examples) == list(first.examples)


def test_the_seed_matters_where_it_chooses_examples(tmp_path: Path, data: Path) -> None:
    stores = [prepare(data, tmp_path / "cache", purpose="train", max_examples=9, seed=seed) for seed in (1, 2)]
    assert stores[0].examples.ids != stores[1].examples.ids


def test_digests_are_remembered_and_a_broken_memory_is_harmless(tmp_path: Path, data: Path, monkeypatch) -> None:
    monkeypatch.setattr(key, "SETTLED_SECONDS", -1.0)
    prepare(data, tmp_path / "cache")
    monkeypatch.setattr(key, "_sha256", lambda path: pytest.fail("the file was read again"))
    assert not prepare(data, tmp_path / "cache").built
    monkeypatch.undo()
    (tmp_path / "cache" / "digests.json").write_text("{not json")
    assert not prepare(data, tmp_path / "cache").built


def test_the_report_survives_a_hit(tmp_path: Path) -> None:
    examples = [*corpus(20), Example("bad", "where?", "Here.", (Answer("There", 0),))]
    path = Path(write_squad(tmp_path / "data.json", examples))
    built = prepare(path, tmp_path / "cache", purpose="train").report
    again = prepare(path, tmp_path / "cache", purpose="train").report
    assert built == again
    assert [one.example_id for one in again.rejected] == ["bad"]
    renamed = path.rename(tmp_path / "renamed.json")
    (row,) = prepare(renamed, tmp_path / "cache", purpose="train").report.rejected
    assert row.where == built.rejected[0].where.replace(str(path), str(renamed)) != built.rejected[0].where


# ---- many processes ----


def run_all(targets: list[Callable[[], None]]) -> list[int | None]:
    """Run each in a process of its own, all at once; their exit codes."""
    processes = [fork.Process(target=target) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.distributed
@pytest.mark.parametrize("count", [2, 4, 8])
def test_each_shard_is_built_exactly_once(tmp_path: Path, data: Path, monkeypatch, count: int) -> None:
    log = tmp_path / "log"
    build = prepare_module.build_features

    def logged(examples: Any, *rest: Any) -> Any:
        with open(log, "a") as handle:
            handle.write(f"{os.getpid()} {examples.strings('example_ids')[0].as_py()}\n")
        time.sleep(0.01)
        return build(examples, *rest)

    monkeypatch.setattr(prepare_module, "build_features", logged)
    alone = prepare(data, tmp_path / "alone")
    log.unlink()

    def build_and_read() -> None:
        store = prepare(data, tmp_path / "cache")
        assert rows(store) == rows(alone)

    assert run_all([build_and_read] * count) == [0] * count
    built = [line.split()[1] for line in log.read_text().splitlines()]
    assert sorted(built) == sorted(f"q{number}" for number in range(0, 60, 8))
    assert files_of(only_entry(tmp_path / "cache")) == files_of(only_entry(tmp_path / "alone"))
    assert not [path.name for path in only_entry(tmp_path / "cache").iterdir() if path.suffix == ".tmp"]


def kill_at(step: str, number: int) -> None:
    """Make this process kill itself at the given write: before it, with the temporary file written, or after it."""
    numbers, here = itertools.count(1), threading.local()  # files are written by two threads
    write, replace = arrow.write_bytes, os.replace

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(path: Path, content: Any) -> None:
        here.number = next(numbers)
        if step == "before" and here.number == number:
            die()
        write(path, content)
        if step == "after" and here.number == number:
            die()

    def replaced(source: Any, target: Any) -> None:
        if step == "between" and getattr(here, "number", 0) == number:
            die()
        replace(source, target)

    arrow.write_bytes = entry.write_bytes = counted
    os.replace = replaced


@pytest.mark.distributed
@pytest.mark.parametrize("step", ["before", "between", "after"])
def test_a_builder_killed_at_any_write_is_taken_over(tmp_path: Path, step: str) -> None:
    path = Path(write_squad(tmp_path / "data.json", corpus(24)))
    alone = prepare(path, tmp_path / "alone")
    wanted = files_of(only_entry(tmp_path / "alone"))
    number = 0
    while True:
        number += 1
        cache = tmp_path / f"cache{number}"

        def build_until_killed(number: int = number, cache: Path = cache) -> None:
            kill_at(step, number)
            prepare(path, cache)

        codes = run_all([build_until_killed])
        store = prepare(path, cache)
        assert files_of(only_entry(cache)) == wanted
        assert rows(store) == rows(alone)
        assert {one.suffix for one in only_entry(cache).iterdir()} <= {".arrow", ".json", ".lock"}
        if codes == [0]:
            break
        assert codes == [-signal.SIGKILL]
    # 3 shards of examples and 3 of features with a mark each, the end of reading, index and manifest.
    assert number == 3 * 4 + 3 + 1


@pytest.mark.slow
@pytest.mark.distributed
def test_builders_killed_at_random_leave_the_same_bytes(tmp_path: Path) -> None:
    path = Path(write_squad(tmp_path / "data.json", corpus(200)))
    began = time.perf_counter()
    prepare(path, tmp_path / "alone")
    took = time.perf_counter() - began
    wanted = files_of(only_entry(tmp_path / "alone"))
    rng = random.Random(5)
    killed = 0
    for number in range(50):
        cache = tmp_path / f"cache{number}"
        builders = [fork.Process(target=prepare, args=(path, cache)) for _ in range(2)]
        for builder in builders:
            builder.start()
        time.sleep(rng.uniform(0, 1.2 * took))
        builders[0].kill()
        for builder in builders:
            builder.join(120)
        killed += builders[0].exitcode == -signal.SIGKILL
        assert builders[1].exitcode == 0
        assert files_of(only_entry(cache)) == wanted
    assert killed > 10


# ---- damage ----


def damage(path: Path, how: str) -> None:
    if how == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("name", ["features-00001.arrow", "examples-00002.arrow", "index.arrow"])
def test_a_damaged_file_is_made_again_alone(tmp_path: Path, data: Path, how: str, name: str) -> None:
    first = prepare(data, tmp_path / "cache")
    entry = only_entry(tmp_path / "cache")
    wanted, content = files_of(entry), rows(first)
    others = {path: path.stat().st_mtime_ns for path in entry.glob("*.arrow") if path.name != name}
    damage(entry / name, how)
    again = prepare(data, tmp_path / "cache")
    assert not again.built
    assert rows(again) == content and list(again.examples) == list(first.examples)
    assert files_of(entry) == wanted
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_a_damaged_manifest_is_a_miss(tmp_path: Path, data: Path) -> None:
    prepare(data, tmp_path / "cache")
    wanted = files_of(only_entry(tmp_path / "cache"))
    damage(only_entry(tmp_path / "cache") / "manifest.json", "cut")
    assert prepare(data, tmp_path / "cache").built
    assert files_of(only_entry(tmp_path / "cache")) == wanted


def test_input_that_changes_while_it_is_read_is_refused(tmp_path: Path, data: Path, monkeypatch) -> None:
    read = prepare_module.read_examples

    def read_and_change(source: DataSource, report: Any) -> Any:
        yield from read(source, report)
        data.write_text(data.read_text() + " ")

    monkeypatch.setattr(prepare_module, "read_examples", read_and_change)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(data, tmp_path / "cache")
    monkeypatch.undo()
    assert prepare(data, tmp_path / "cache").built


# ---- folders that cannot be written ----


def as_nobody(action: Callable[[], None]) -> Callable[[], None]:
    """The action as a user whom the permissions of folders stop; root is not stopped."""

    def run() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        action()

    return run


def make_read_only(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH | (0o111 if path.is_dir() else 0))
    for parent in folder.parents:
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)


def test_a_read_only_cache_is_used_and_not_written(tmp_path: Path, data: Path) -> None:
    first = prepare(data, tmp_path / "cache")
    make_read_only(tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}

    def use() -> None:
        store = prepare(data, tmp_path / "cache")
        assert not store.built and rows(store) == rows(first)
        with pytest.raises(UserError, match="--cache_dir"):
            prepare(data, tmp_path / "cache", max_examples=3)

    assert run_all([as_nobody(use)]) == [0]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


@pytest.mark.parametrize("limit", [200, 3000, 20000])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, limit: int) -> None:
    """A limit on the size of a file stands in for the full disk: the write fails half-way in the same manner."""
    path = Path(write_squad(tmp_path / "data.json", corpus(200)))

    def build() -> None:
        example_store.SMALL_SHARD = 100
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(UserError, match="the disk is full") as caught:
            prepare(path, tmp_path / "cache")
        assert "\n" not in str(caught.value)

    assert run_all([build]) == [0]
    left = list((tmp_path / "cache").rglob("*"))
    assert not [one for one in left if one.name == "manifest.json" or one.suffix == ".tmp"]
    store = prepare(path, tmp_path / "cache")
    assert rows(store) == rows(prepare(path, tmp_path / "elsewhere"))


def test_the_cache_holds_no_pickle_and_few_files(tmp_path: Path) -> None:
    path = Path(write_squad(tmp_path / "data.json", corpus(8)))
    prepare(path, tmp_path / "cache")
    names = sorted(one.name for one in only_entry(tmp_path / "cache").iterdir() if one.suffix != ".lock")
    assert names == ["examples-00000.arrow", "features-00000.arrow", "index.arrow", "manifest.json"]
    assert "pickle" not in sys.modules["qa_deepspeed.qa.features.arrow"].__dict__
    assert json.loads((only_entry(tmp_path / "cache") / "manifest.json").read_text())["counts"]["examples"] == 8
