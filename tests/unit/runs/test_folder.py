"""Whose folder it is, what differs from the run that it holds, and who may write there."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.ds_config import ResolvedConfig, resolve
from qa_deepspeed.runs.folder import leave_run_dir, lock_run_dir, writable_folder, write_run
from qa_deepspeed.runs.identity import run_fingerprint
from qa_deepspeed.runs.lock import LOCK_FILE
from qa_deepspeed.runs.resume import resume_decision
from qa_deepspeed.utils.errors import UserError
from tests.unit.small_disk import mounted


def resolved(**options: object) -> ResolvedConfig:
    return resolve(RunOptions(**options, given=frozenset(options)), 1, "cpu")  # type: ignore[arg-type]


def begin(folder: Path, ours: ResolvedConfig, head: str = "span") -> str:
    """What a run of these settings would do in `folder`."""
    return resume_decision(folder, ours.options, run_fingerprint(ours, "features", 100, head)).action


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """The folder of an unfinished run with the default settings, and no checkpoint yet."""
    theirs = resolved()
    write_run(tmp_path, "running", run_fingerprint(theirs, "features", 100, "span"), options=theirs.options.to_dict())
    return tmp_path


def config_file(folder: Path, **sections: object) -> str:
    (folder / "config.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", **sections}))
    return str(folder / "config.json")


def test_the_same_run_resumes(held: Path) -> None:
    assert begin(held, resolved()) == "start"
    assert begin(held, resolved(save_steps=7, deepspeed_config="zero3")) == "start"


ADAM = {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.98]}}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"optimizer": ADAM}, 'optimizer was default, is AdamW {"betas": [0.9, 0.98]}'),
        ({"optimizer": {"type": "Lion", "params": {"lr": "auto"}}}, "optimizer was default, is Lion"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}},
            "scheduler was default, is WarmupLR",
        ),
    ],
)
def test_another_optimizer_or_schedule_is_refused_by_name(
    held: Path, tmp_path_factory: pytest.TempPathFactory, sections: dict[str, object], words: str
) -> None:
    ours = resolved(deepspeed_config=config_file(tmp_path_factory.mktemp("config"), **sections))
    with pytest.raises(UserError) as caught:
        begin(held, ours)
    assert words in str(caught.value) and "resume_with_changes" not in str(caught.value)


def test_another_head_is_refused_by_name_and_cannot_be_allowed(held: Path) -> None:
    with pytest.raises(UserError, match="head was span, is beam"):
        begin(held, resolved(qa_head="beam"), "beam")
    with pytest.raises(UserError, match="names 'head', which is unknown, can always change, or can never change"):
        begin(held, resolved(qa_head="beam", resume_with_changes="head"), "beam")
    assert begin(held, resolved(qa_head="span")) == "start"  # what it was without being said


def test_another_run_is_refused_with_what_differs(held: Path) -> None:
    with pytest.raises(UserError, match="learning_rate was 5e-05, is 0.01; seed was 42, is 7.*--resume_with_changes"):
        begin(held, resolved(learning_rate=0.01, seed=7))
    assert begin(held, resolved(learning_rate=0.01, seed=7, resume_with_changes="learning_rate,seed")) == "start"


def test_a_cache_inside_a_new_output_folder_is_no_other_run(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "features").touch()
    assert begin(tmp_path, resolved(cache_dir=str(cache))) == "start"
    with pytest.raises(UserError, match="is not empty"):
        begin(tmp_path, resolved())


def test_a_folder_that_will_be_written_is_held_and_another_is_not_touched(tmp_path: Path) -> None:
    """Also for a run that is asked to overwrite."""
    (tmp_path / "thesis.tex").touch()
    options = RunOptions(output_dir=str(tmp_path))
    assert lock_run_dir(tmp_path, options) is None and not (tmp_path / LOCK_FILE).exists()
    lock = lock_run_dir(tmp_path, replace(options, overwrite_output_dir=True))
    assert lock is not None
    lock.release()


@pytest.mark.parametrize("existed", [True, False])
def test_a_run_that_is_refused_at_its_start_leaves_no_trace(tmp_path: Path, existed: bool) -> None:
    """But for what it found out about the data; a run that has begun leaves its lock file."""
    folder = tmp_path / "run"
    folder.mkdir()
    leave_run_dir(folder, lock_run_dir(folder, RunOptions()), existed)
    assert folder.exists() == existed and (not existed or not list(folder.iterdir()))
    folder.mkdir(exist_ok=True)
    (folder / "rejected_train.jsonl").touch()
    leave_run_dir(folder, lock_run_dir(folder, RunOptions()), existed)
    assert [path.name for path in folder.iterdir()] == ["rejected_train.jsonl"]
    lock = lock_run_dir(folder, RunOptions())
    write_run(folder, "running", {})
    leave_run_dir(folder, lock, existed)
    assert (folder / LOCK_FILE).exists()


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk that cannot be written, not even by root."""
    with mounted(tmp_path / "read_only", "ro,size=1m") as folder:
        yield folder


def test_a_read_only_folder_is_reported_before_anything_else(read_only: Path) -> None:
    with pytest.raises(UserError, match="cannot be written .Read-only file system.: pass another one"):
        writable_folder(str(read_only))
    with pytest.raises(UserError, match="cannot create output_dir .*Read-only file system"):
        writable_folder(str(read_only / "run"))


def test_a_folder_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not UTF-8"):
        writable_folder(os.fsdecode(b"%s/out-\xe9" % os.fsencode(tmp_path)))
    assert not list(tmp_path.iterdir())
