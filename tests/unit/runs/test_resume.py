"""What a run does in a folder is decided without changing it; an overwritten run comes back when the new one fails."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.checkpoints.checkpoint_files import (
    LoopState,
    read_loop_state,
    write_loop_state,
    write_manifest,
)
from qa_deepspeed.runs.folder import files_of_run, write_run
from qa_deepspeed.runs.previous import PREFIX, PreviousRun, recover
from qa_deepspeed.runs.resume import ResumeDecision, read_run, resume_decision, select_checkpoint
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.json_files import CHECKSUM
from tests.unit.damage import DAMAGE

FINGERPRINT: dict[str, Any] = {"learning_rate": 5e-5, "global_batch_size": 8, "steps": 10}


def options_for(folder: Path, **more: Any) -> RunOptions:
    return RunOptions(output_dir=str(folder), **more)


def checkpoint(folder: Path, step: int, fingerprint: dict[str, Any] = FINGERPRINT) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    write_loop_state(path, LoopState(step, 1, 2, "fp32", "cpu", fingerprint, 80, [], {}, {}, {}, {}))
    (path / "shard.pt").write_bytes(b"weights")
    write_manifest(path)
    return path


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A finished run with a checkpoint, and a file of the user's beside it."""
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoint(folder, 5)
    write_run(folder, "finished", FINGERPRINT, options={})
    (folder / "model.safetensors").write_bytes(b"model")
    (folder / "notes.txt").write_text("mine")
    return folder


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, ResumeDecision("finished")),
        ({"overwrite_output_dir": True}, ResumeDecision("start", overwrites=True)),
        ({"resume_from_checkpoint": "true"}, ResumeDecision("finished")),
        ({"resume_from_checkpoint": "True"}, ResumeDecision("finished")),
    ],
)
def test_deciding_changes_nothing(old_run: Path, more: dict[str, Any], expected: ResumeDecision) -> None:
    before = listing(old_run)
    assert resume_decision(old_run, options_for(old_run, **more), FINGERPRINT) == expected
    assert listing(old_run) == before


def test_a_finished_run_is_not_evaluated_in_another_way_by_its_training_command(old_run: Path) -> None:
    """Nothing would be evaluated; the error names the options and the command that evaluates."""
    recorded = options_for(old_run, do_eval=True, predict_file="dev.json")
    write_run(old_run, "finished", FINGERPRINT, options=recorded.to_dict())
    assert resume_decision(old_run, recorded, FINGERPRINT).action == "finished"
    for change in ({"predict_file": "other.json"}, {"n_best_size": 7}):
        with pytest.raises(UserError, match=f"had another {next(iter(change))}: `qa-deepspeed evaluate"):
            resume_decision(old_run, replace(recorded, **change), FINGERPRINT)
    write_run(old_run, "finished", FINGERPRINT, options=options_for(old_run).to_dict())
    for first in (recorded, replace(recorded, do_eval=False, eval_steps=5)):
        with pytest.raises(UserError, match="had another do_eval, predict_file"):
            resume_decision(old_run, first, FINGERPRINT)
    assert resume_decision(old_run, replace(recorded, do_eval=False), FINGERPRINT).action == "finished"


def test_an_unfinished_run_resumes_from_its_newest_or_the_named_checkpoint(old_run: Path) -> None:
    write_run(old_run, "running", FINGERPRINT, options={})
    assert resume_decision(old_run, options_for(old_run), FINGERPRINT) == ResumeDecision("resume", "auto")
    named = str(old_run / "checkpoint-5")
    decided = resume_decision(old_run, options_for(old_run, resume_from_checkpoint=named), FINGERPRINT)
    assert decided == ResumeDecision("resume", named)


def test_overwriting_and_resuming_contradict_each_other(old_run: Path) -> None:
    options = options_for(old_run, overwrite_output_dir=True, resume_from_checkpoint=str(old_run / "checkpoint-5"))
    with pytest.raises(UserError, match="leave one of them out"):
        resume_decision(old_run, options, FINGERPRINT)


@pytest.mark.parametrize("name", ["model_name_or_path", "tokenizer_name", "config_name"])
@pytest.mark.parametrize("inside", ["", "checkpoint-5/model"])
def test_what_the_new_run_reads_is_not_overwritten(old_run: Path, name: str, inside: str) -> None:
    (old_run / "checkpoint-5/model").mkdir()
    options = options_for(old_run, overwrite_output_dir=True, **{name: str(old_run / inside)})
    with pytest.raises(UserError, match=f"would remove .*, which --{name} names"):
        resume_decision(old_run, options, FINGERPRINT)


def test_a_data_file_that_would_be_removed_is_refused_also_through_a_link(old_run: Path, tmp_path: Path) -> None:
    (old_run / "predictions.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(old_run / "predictions.json")
    options = options_for(old_run, overwrite_output_dir=True, train_file=str(tmp_path / "link.json"))
    with pytest.raises(UserError, match="which --train_file names"):
        resume_decision(old_run, options, FINGERPRINT)
    kept = options_for(old_run, overwrite_output_dir=True, train_file=str(old_run / "notes.txt"))
    assert resume_decision(old_run, kept, FINGERPRINT).overwrites


def test_a_folder_that_no_run_made_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500/model.safetensors").write_bytes(b"another program's")
    (tmp_path / "predictions.json").write_text("{}")
    with pytest.raises(UserError, match="no run of this trainer"):
        resume_decision(tmp_path, options_for(tmp_path, overwrite_output_dir=True), FINGERPRINT)


def test_only_the_runs_own_files_are_moved(old_run: Path) -> None:
    (old_run / "checkpoint-900").mkdir()  # another program's: it has no loop state
    (old_run / "tensorboard").symlink_to(old_run.parent)
    moved = {path.name for path in files_of_run(old_run)}
    assert moved == {"checkpoint-5", "run.json", "model.safetensors", "tensorboard"}
    PreviousRun.move_aside(old_run, files_of_run(old_run)).discard()
    assert {path.name for path in old_run.iterdir()} == {"checkpoint-900", "notes.txt"}
    assert old_run.parent.is_dir(), "a link is removed, not what it points to"


def test_a_start_that_fails_puts_the_old_run_back(old_run: Path) -> None:
    before = listing(old_run)
    previous = PreviousRun.move_aside(old_run, files_of_run(old_run))
    write_run(old_run, "running", {"new": 1})
    (old_run / "metrics.jsonl").write_text("{}")
    previous.restore()
    assert listing(old_run) == before
    previous.restore()
    assert listing(old_run) == before


def test_a_killed_start_puts_the_old_run_back_unless_the_new_one_has_saved(old_run: Path) -> None:
    before = listing(old_run)
    PreviousRun.move_aside(old_run, files_of_run(old_run))
    write_run(old_run, "running", {"new": 1})
    assert recover(old_run) and listing(old_run) == before
    PreviousRun.move_aside(old_run, files_of_run(old_run))
    checkpoint(old_run, 2)
    assert not recover(old_run)
    assert not list(old_run.glob(f"{PREFIX}*")) and (old_run / "checkpoint-2").is_dir()


@pytest.mark.parametrize("done", range(6))
def test_an_interrupted_move_loses_nothing(old_run: Path, monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    """Renames fail after `done` of them, also those that would undo the move: the next start completes it."""
    before, rename, renames = listing(old_run), os.rename, [0]

    def failing(source: Path, target: Path) -> None:
        renames[0] += 1
        if renames[0] > done:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", failing)
        with contextlib.suppress(OSError):
            PreviousRun.move_aside(old_run, files_of_run(old_run)).restore()
    recover(old_run)
    assert listing(old_run) == before


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"status": "running"}'])
def test_a_damaged_record_is_replaced_by_what_the_checkpoints_know(old_run: Path, content: str) -> None:
    (old_run / "run.json").write_text(content)
    record = read_run(old_run)
    assert record is not None and record["identity"] == FINGERPRINT
    assert resume_decision(old_run, options_for(old_run), FINGERPRINT) == ResumeDecision("resume", "auto")


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=DAMAGE)
def test_no_damage_of_the_record_refuses_the_same_run(old_run: Path, damage: Callable[[bytes], bytes]) -> None:
    """A flipped digit of the fingerprint would look like a run of other settings."""
    write_run(old_run, "finished", FINGERPRINT, options={})
    path = old_run / "run.json"
    path.write_bytes(damage(path.read_bytes()))
    assert resume_decision(old_run, options_for(old_run), FINGERPRINT).action in ("resume", "finished")


def test_a_damaged_record_is_named_in_one_line(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = old_run / "run.json"
    path.write_text(path.read_text().replace('"steps": 10', '"steps": 11'))
    assert resume_decision(old_run, options_for(old_run), FINGERPRINT) == ResumeDecision("resume", "auto")
    assert capsys.readouterr().out == (
        f"{path}: does not hold what was written (its checksum differs); taking what the checkpoints know\n"
    )


def test_a_record_of_an_earlier_version_has_no_checksum(old_run: Path) -> None:
    path = old_run / "run.json"
    record = json.loads(path.read_text())
    assert record.pop(CHECKSUM)
    path.write_text(json.dumps(record))
    assert resume_decision(old_run, options_for(old_run), FINGERPRINT) == ResumeDecision("finished")


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=DAMAGE, name=st.sampled_from(["loop.json", "manifest.json"]))
def test_a_damaged_checkpoint_is_passed_over(
    old_run: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes], name: str
) -> None:
    for step in (7, 5):
        shutil.rmtree(old_run / f"checkpoint-{step}", ignore_errors=True)
    older, newer = checkpoint(old_run, 5), checkpoint(old_run, 7)
    content = (newer / name).read_bytes()
    (newer / name).write_bytes(damage(content))
    chosen = select_checkpoint(old_run, "auto", FINGERPRINT)
    printed = capsys.readouterr().out
    if chosen == older:
        assert printed.startswith(f"{newer} is damaged and not used: ") and printed.count("\n") == 1
    else:
        assert json.loads((newer / name).read_bytes()) == json.loads(content), "only white space changed"


def test_another_folder_without_checkpoints_has_no_record(tmp_path: Path) -> None:
    assert read_run(tmp_path) is None


@pytest.mark.parametrize("position", range(0, 600, 23))
def test_a_flipped_bit_in_the_loop_state_is_damage(tmp_path: Path, position: int) -> None:
    """Wherever it is: in a key, a number or a bracket."""
    path = checkpoint(tmp_path, 5) / "loop.json"
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="checkpoint-5"):
        read_loop_state(tmp_path / "checkpoint-5")


def test_a_requeued_run_resumes_although_it_says_overwrite(old_run: Path) -> None:
    write_run(old_run, "running", FINGERPRINT, options={})
    (old_run / "requeue").write_text("{}")
    options = options_for(old_run, overwrite_output_dir=True)
    assert resume_decision(old_run, options, FINGERPRINT) == ResumeDecision("resume", "auto")
    assert resume_decision(old_run, options, {**FINGERPRINT, "steps": 11}) == ResumeDecision("start", overwrites=True)
