"""What is compared when a run resumes: every part of its fingerprint, in run.json and in the checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.checkpoints.checkpoint_files import LoopState, newest_first, write_loop_state
from qa_deepspeed.engine.ds_config import resolve
from qa_deepspeed.runs.folder import write_run
from qa_deepspeed.runs.identity import completed_steps, refuse_changes, run_fingerprint
from qa_deepspeed.runs.resume import FINISHED, START, resume_decision, resumed_batch_size
from qa_deepspeed.utils.errors import UserError

CHANGES = {
    "model_name_or_path": "other",
    "learning_rate": 1.0,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.5,
    "adam_epsilon": 0.5,
    "max_grad_norm": 0.5,
    "warmup_steps": 7,
    "objective": "marginal",
    "label_smoothing": 0.5,
    "seed": 7,
    "features": "other",
    "steps": 99,
    "global_batch_size": 99,
    "precision": "bf16",
    "head": "beam",
    "optimizer": "Lion",
    "scheduler": "WarmupLR",
    "lora": [8, 16, 0.0, None],
}
"""Another value of each part of a fingerprint."""


def fingerprint(options: RunOptions) -> dict[str, object]:
    """That of a run on one rank."""
    return run_fingerprint(resolve(options, 1, "cpu"), "features", 100, "span")


def loop_state(options: RunOptions, **changes: object) -> LoopState:
    """The loop's state after 10 steps."""
    state = LoopState(
        step=10,
        world_size=1,
        zero_stage=2,
        precision="fp32",
        device="cpu",
        identity=fingerprint(options),
        rows=100,
        optimized=[],
        options=options.to_dict(),
        config={},
        versions={},
        best={},
    )
    return replace(state, **changes)


def test_the_table_of_changes_has_every_part() -> None:
    assert set(CHANGES) == set(fingerprint(RunOptions()))


@pytest.mark.parametrize("part", CHANGES)
def test_a_change_of_any_part_is_refused(part: str, tmp_path: Path) -> None:
    """In the output folder's record, and in a checkpoint that the command names."""
    options = RunOptions(output_dir=str(tmp_path / "run"))
    ours = fingerprint(options)
    theirs = {**ours, part: CHANGES[part]}
    with pytest.raises(UserError, match="holds another run"):
        refuse_changes(theirs, ours, options.to_dict(), options, "folder")
    folder = tmp_path / "run"
    folder.mkdir()
    write_run(folder, "running", theirs, options=options.to_dict())
    with pytest.raises(UserError, match=f"{folder} holds another run"):
        resume_decision(folder, options, ours)
    checkpoint = tmp_path / "theirs" / "checkpoint-10"
    checkpoint.mkdir(parents=True)
    write_loop_state(checkpoint, loop_state(options, identity=theirs))
    named = replace(options, output_dir=str(tmp_path / "new"), resume_from_checkpoint=str(checkpoint))
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match=f"{checkpoint} holds another run"):
        resume_decision(tmp_path / "new", named, ours)


def test_a_finished_run_is_finished_only_with_its_own_settings(tmp_path: Path) -> None:
    """Settings that may change start it again, though run.json says that it has ended."""
    options = RunOptions()
    write_run(tmp_path, "finished", fingerprint(options), options=options.to_dict())
    assert resume_decision(tmp_path, options, fingerprint(options)).action == FINISHED
    changed = replace(options, seed=7, resume_with_changes="seed")
    assert resume_decision(tmp_path, changed, fingerprint(changed)).action == START


def test_checkpoints_of_the_current_settings_come_first(tmp_path: Path) -> None:
    """Though one of earlier settings was written later."""
    mine, earlier = loop_state(RunOptions(seed=1)), loop_state(RunOptions(seed=2), step=20)
    for state in (mine, earlier):
        folder = tmp_path / f"checkpoint-{state.step}"
        folder.mkdir()
        write_loop_state(folder, state)
    assert [path.name for path in newest_first(tmp_path, mine.identity)] == ["checkpoint-10", "checkpoint-20"]
    assert [path.name for path in newest_first(tmp_path, earlier.identity)] == ["checkpoint-20", "checkpoint-10"]


def test_the_global_batch_size_is_kept_where_micro_batches_are_unchanged(tmp_path: Path) -> None:
    options = RunOptions(per_gpu_train_batch_size=4)
    write_run(tmp_path, "running", fingerprint(options) | {"global_batch_size": 24}, options=options.to_dict())
    assert resumed_batch_size(tmp_path, options) == 24
    assert resumed_batch_size(tmp_path, replace(options, per_gpu_train_batch_size=8)) is None
    assert resumed_batch_size(tmp_path, replace(options, gradient_accumulation_steps=2)) is None
    assert resumed_batch_size(tmp_path, replace(options, resume_with_changes="global_batch_size")) is None
    assert resumed_batch_size(tmp_path, replace(options, overwrite_output_dir=True)) is None


@pytest.mark.parametrize(("theirs", "ours", "steps"), [(8, 8, 10), (8, 4, 20), (8, 16, 5), (8, 32, 2), (8, 100, 0)])
def test_completed_steps_are_the_same_fraction_of_the_epoch(theirs: int, ours: int, steps: int) -> None:
    """After 10 steps of 8 rows: 80 of 100 rows."""
    state = loop_state(RunOptions(), identity={"global_batch_size": theirs})
    assert completed_steps(state, {"global_batch_size": ours}, 100) == steps


def test_completed_steps_count_whole_epochs_first() -> None:
    """An epoch of 100 rows has 13 steps of 8 and 25 of 4: 3 steps into the second epoch are 6 there."""
    state = loop_state(RunOptions(), step=16, identity={"global_batch_size": 8})
    assert completed_steps(state, {"global_batch_size": 4}, 100) == 25 + 6


def test_weights_of_files_are_part_of_the_fingerprint_only_where_there_are_some() -> None:
    """A finished run of an earlier version, whose record has no weights, stays finished."""
    options = RunOptions(train_file="a.json=2,b.json")
    without, ours = (
        fingerprint(options),
        run_fingerprint(resolve(options, 1, "cpu"), "features", 100, "span", (2.0, 1.0)),
    )
    assert ours == {**without, "mixture": [2.0, 1.0]}
    theirs = {**ours, "mixture": [3.0, 1.0], "steps": 120}
    before = replace(options, train_file="a.json=3,b.json").to_dict()
    with pytest.raises(
        UserError, match="run: train_file was a.json=3,b.json, is a.json=2,b.json; steps was 120, is 100"
    ):
        refuse_changes(theirs, ours, before, options, "run")
    with pytest.raises(UserError, match="train_file was a.json=3"):
        refuse_changes(without, ours, before, options, "run")
    for allowed in ("train_file", "mixture"):
        refuse_changes(theirs, ours, before, replace(options, resume_with_changes=allowed), "run")


def test_groups_by_layer_are_part_of_the_fingerprint_only_where_they_are_used() -> None:
    """In one spelling; they never change on resume, as the optimizer's state depends on them."""
    plain, options = fingerprint(RunOptions()), RunOptions(freeze="0-1,embeddings", layerwise_lr_decay=0.9)
    assert "layers" not in plain
    ours = fingerprint(options)
    assert ours == {**plain, "layers": [0.9, -1, 0, 1]} == fingerprint(replace(options, freeze="embeddings, 1,0"))
    with pytest.raises(UserError, match="freeze was None, is 0-1,embeddings") as caught:
        refuse_changes(plain, ours, RunOptions().to_dict(), options, "run")
    assert "layerwise_lr_decay was 1.0, is 0.9" in str(caught.value) and "resume_with_changes" not in str(caught.value)


def test_teachers_are_part_of_the_fingerprint_only_where_there_are_some() -> None:
    """By the digests of their weights, not by their folders."""
    teacher = {"teacher_model_name_or_path": "large", "distillation_weight": 0.9}
    options = RunOptions(**teacher)  # type: ignore[arg-type]
    settings = resolve(options, 1, "cpu"), "features", 100, "span", None
    without, ours = run_fingerprint(*settings), run_fingerprint(*settings, ["digest"])
    assert without == fingerprint(RunOptions()) and ours == {**without, "distillation": [0.9, 2.0, "digest"]}
    plain = RunOptions()
    with pytest.raises(
        UserError, match="teacher_model_name_or_path was None, is large; distillation_weight was 0.5, is"
    ):
        refuse_changes(without, ours, plain.to_dict(), options, "run")
    with pytest.raises(UserError, match="teacher_model_name_or_path was large, is None"):
        refuse_changes(ours, without, options.to_dict(), plain, "run")
    with pytest.raises(UserError, match="run: the weights of large are others than before"):
        refuse_changes({**ours, "distillation": [0.9, 2.0, "other"]}, ours, options.to_dict(), options, "run")
    allowed = replace(options, resume_with_changes="distillation_weight")
    refuse_changes({**ours, "distillation": [0.5, 2.0, "digest"]}, ours, options.to_dict(), allowed, "run")
