"""One rank of a launch that plays scenes with checkpoints, all or those named.

    -m tests.distributed.checkpoint_scenes OPTIONS.json FOLDER [SCENE ...]

All in one launch, since starting costs more than training a tiny model. Every rank asserts; one that fails ends all.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file

from qa_deepspeed.cli.inference.export import export
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.checkpoints.checkpoint import full_weights
from qa_deepspeed.engine.checkpoints.checkpoint_files import (
    LOOP_FILE,
    MANIFEST_FILE,
    checkpoints,
    read_loop_state,
    verify_checkpoint,
)
from qa_deepspeed.engine.checkpoints.shards import Shards
from qa_deepspeed.engine.deepspeed_compat import plain_values_only
from qa_deepspeed.runs.verify import load_reference_outputs, verify_saved_model
from qa_deepspeed.training import stopping
from qa_deepspeed.training.train import train
from qa_deepspeed.utils import dist, progress
from qa_deepspeed.utils.errors import UserError
from tests.distributed.launching import losses

OPTIONS: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
FOLDER = Path(sys.argv[2])


class Listener(io.StringIO):
    """What is printed; does something once when it reads a text (on rank 0, where the log is)."""

    def __init__(self, text: str, act: Callable[[], None]) -> None:
        super().__init__()
        self._text, self._act = text, act

    def write(self, part: str) -> int:
        written = super().write(part)
        if self._text and self._text in self.getvalue():
            self._text = ""
            self._act()
        return written


def run(name: str, when: str = "", act: Callable[[], None] = lambda: None, **changes: object) -> str:
    """Train into FOLDER/name; returns what all ranks printed, with the error a user would see; `act` at a text."""
    given = {**OPTIONS, "output_dir": str(FOLDER / name), **changes}
    printed = Listener(when, act)
    with contextlib.redirect_stdout(printed):
        try:
            train(RunOptions(**given, given=frozenset(given)))
        except UserError as error:
            print(f"error: {error}")
        except Exception as error:
            if type(error).__name__ != "Preempted":
                raise
            print(f"stopped: {error}")
    return from_all(printed.getvalue())


def from_all(text: str) -> str:
    """The output of every rank in turn: some lines come from the rank that writes for its disk."""
    (FOLDER / f".printed-{dist.rank()}").write_text(text)
    dist.barrier()
    together = "".join((FOLDER / f".printed-{rank}").read_text() for rank in range(dist.world_size()))
    dist.barrier()
    return together


def on_first(act: Callable[[], Any]) -> None:
    """Do something to the files on rank 0 while the others wait."""
    if dist.is_rank_zero():
        act()
    dist.barrier()


def unfinished_copy(name: str, new: str) -> None:
    """A copy of a finished run as it was just before its end."""

    def copy() -> None:
        shutil.copytree(FOLDER / name, FOLDER / new)
        run_file = FOLDER / new / "run.json"
        record = json.loads(run_file.read_text())
        del record["json_checksum"]  # else the change would be damage
        run_file.write_text(json.dumps({**record, "status": "running"}))
        (FOLDER / new / "model.safetensors").unlink()

    on_first(copy)


def same_model(one: str, other: str) -> bool:
    """Whether two runs ended with the same bytes."""
    return (FOLDER / one / "model.safetensors").read_bytes() == (FOLDER / other / "model.safetensors").read_bytes()


def noise(path: Path) -> None:
    """Other bytes, the same size."""
    path.write_bytes(os.urandom(path.stat().st_size))


def damaged_checkpoints_are_named_and_passed_over() -> None:
    """The newest has lost its state, a shard of the one before is noise: the first is taken, the end is the same.

    Characters of glob patterns in the folder's name stand for themselves.
    """
    name = "damaged [1]*?"
    unfinished_copy("whole", name)
    folder = FOLDER / name
    on_first(lambda: (folder / "checkpoint-6" / LOOP_FILE).unlink())
    on_first(lambda: noise(next((folder / "checkpoint-4").glob("*rank_1*optim_states.pt"))))
    printed = run(name)
    assert f"checkpoint-6 is damaged and not used: {LOOP_FILE} is missing" in printed, printed
    assert "optim_states.pt is corrupted" in printed, printed
    assert "checkpoint-2, step 2 of 6" in printed, printed
    assert same_model("whole", name)


def every_file_of_a_checkpoint_is_watched() -> None:
    """Each one cut, emptied, missing or filled with noise: the damage is seen and the file named."""
    unfinished_copy("whole", "watched")
    folder = FOLDER / "watched/checkpoint-6"

    def check() -> None:
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) >= 8, files
        for path in files:
            content = path.read_bytes()
            for spoil in (
                lambda path: os.truncate(path, path.stat().st_size // 2),
                lambda path: path.write_bytes(b""),
                noise,
                Path.unlink,
            ):
                spoil(path)
                assert path.name in (verify_checkpoint(folder) or ""), (path, verify_checkpoint(folder))
                path.write_bytes(content)
        assert verify_checkpoint(folder) is None

    on_first(check)


def nothing_starts_from_zero_in_silence() -> None:
    """No checkpoint is whole: that is said, on all ranks."""
    unfinished_copy("whole", "lost")
    for step in (2, 4, 6):
        on_first(lambda step=step: (FOLDER / "lost" / f"checkpoint-{step}" / MANIFEST_FILE).unlink())
    printed = run("lost")
    assert "error: all checkpoints in" in printed, printed
    assert printed.count(f"{MANIFEST_FILE} is missing") == 3, printed
    assert not (FOLDER / "lost/model.safetensors").exists()


def a_limit_keeps_the_last_ones() -> None:
    """Also by share of the run: a third of 6 steps."""
    run("few", save_steps=1 / 3, save_total_limit=2)
    assert [path.name for path in checkpoints(FOLDER / "few")] == ["checkpoint-4", "checkpoint-6"]
    assert same_model("whole", "few")


def the_clock_saves_and_stops() -> None:
    """Rank 0's clock decides for all ranks when to save and when to stop; the same command resumes."""
    passed = 0.0

    def an_hour_passes() -> None:
        nonlocal passed
        passed += 3600

    stopping.time = SimpleNamespace(monotonic=lambda: time.monotonic() + passed)  # type: ignore[assignment]
    printed = run("clock", "step 3/6", an_hour_passes, save_steps=0, save_on_time="1h")
    assert [path.name for path in checkpoints(FOLDER / "clock")] == ["checkpoint-3"], printed
    printed = run("clock_stops", "step 3/6", an_hour_passes, save_steps=0, max_time="1h")
    assert "stopped: preempted by max_time after step 3 of 6" in printed, printed
    assert json.loads((FOLDER / "clock_stops/requeue").read_text())["reason"] == "max_time"
    again = run("clock_stops", save_steps=0)
    assert same_model("whole", "clock_stops") and "step 3 of 6" in again
    assert not (FOLDER / "clock_stops/requeue").exists()


def a_signal_on_one_rank_stops_all_after_the_step() -> None:
    """Two that follow at once are one."""

    def warn() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)

    printed = run("signal", "step 4/6", warn, save_steps=0)
    assert "stopped: preempted by SIGUSR1 after step 4 of 6" in printed, printed
    run("signal", save_steps=0)
    assert same_model("whole", "signal")


def stopping_at(step: int, name: str, **changes: object) -> str:
    """Train until a signal comes after `step`, without other checkpoints than the one that it leaves."""
    return run(name, f"step {step}/6", lambda: os.kill(os.getpid(), signal.SIGUSR1), save_steps=0, **changes)


def states(name: str, step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and optimizer state of every parameter in a run's checkpoint."""
    folder = FOLDER / name / f"checkpoint-{step}"
    state = read_loop_state(folder)
    shards = Shards(folder, state.zero_stage, state.world_size, state.optimized, state.flat)
    assert shards.optimizer_step == step
    return {parameter: shards.read(parameter) for parameter in sorted(shards.names)}


def same_states(one: str, other: str, step: int) -> None:
    """Two checkpoints hold the same numbers to rounding; three are compared, so that moments are not forgotten."""
    ours, theirs = states(one, step), states(other, step)
    assert ours.keys() == theirs.keys()
    for parameter in ours:
        assert ours[parameter].keys() == {"weight", "exp_avg", "exp_avg_sq"} == theirs[parameter].keys()
        for key in ours[parameter]:
            torch.testing.assert_close(ours[parameter][key], theirs[parameter][key], rtol=1e-3, atol=2e-6)


def any_stage_resumes_from_any_other() -> None:
    """A step or two at each stage in one folder: weights, moments, losses and rates as uninterrupted at ZeRO-2."""
    way = {1: "zero0", 2: "zero1", 3: "zero3", 4: "zero2", 5: "zero3"}
    for step, stage in way.items():
        printed = stopping_at(step, "crossing", deepspeed_config=stage)
        assert f"step {step} of 6" in printed and "preempted by" in printed, printed
        if step % 2 == 0:
            same_states("whole", "crossing", step)
    run("crossing", deepspeed_config="zero0")
    if dist.is_rank_zero():
        np.testing.assert_allclose(losses(FOLDER / "crossing"), losses(FOLDER / "whole"), rtol=1e-4)
        ours, theirs = (logged(name, "train/learning_rate") for name in ("crossing", "whole"))
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def logged(name: str, key: str) -> list[float]:
    """A value of every log line of a run."""
    lines = (json.loads(line) for line in (FOLDER / name / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def changes_are_refused_by_name_unless_named() -> None:
    """Learning rate, data, seed and batch; a named change is followed, also by the schedule."""
    stopping_at(2, "changed", deepspeed_config="zero1")
    other_data = FOLDER / "other.json"
    on_first(lambda: other_data.write_text(Path(OPTIONS["train_file"]).read_text().replace("the", "teh")))
    for change, words in (
        ({"learning_rate": 5e-4}, "learning_rate was 0.001, is 0.0005"),
        ({"train_file": str(other_data)}, f"train_file was {OPTIONS['train_file']}, is {other_data}"),
        ({"seed": 7}, "seed was 42, is 7"),
        ({"global_batch_size": 16}, "global_batch_size was 8, is 16"),
        ({"learning_rate": 5e-4, "resume_with_changes": "seed"}, "learning_rate was 0.001, is 0.0005"),
        ({"resume_with_changes": "learning_rat"}, "did you mean 'learning_rate'"),
    ):
        printed = run("changed", deepspeed_config="zero1", **change)
        assert f"error: {FOLDER}" in printed or "error: resume" in printed, printed
        assert words in printed, printed
    run(
        "changed",
        deepspeed_config="zero1",
        learning_rate=5e-4,
        weight_decay=0.1,
        save_steps=4,
        resume_with_changes="learning_rate, weight_decay",
    )
    if dist.is_rank_zero():
        np.testing.assert_allclose(logged("changed", "train/learning_rate")[2:], 5e-4 * np.arange(4, 0, -1) / 6)
        with plain_values_only():
            state = torch.load(next((FOLDER / "changed/checkpoint-4").glob("*rank_0*optim_states.pt")))
        groups = state["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def the_best_model_stays_and_is_the_end() -> None:
    """At ZeRO-3, with patience and one checkpoint at most: the best is kept, and what is saved is it."""
    printed = run(
        "best",
        deepspeed_config="zero3",
        logging_steps=1,
        save_steps=1,
        save_total_limit=1,
        max_steps=6,
        evaluate_during_training=True,
        metric_for_best_model="HasAns_f1",
        early_stopping_patience=2,
        load_best_model_at_end=True,
        learning_rate=1e-2,
        adam_epsilon=1e-8,
    )
    folder = FOLDER / "best"
    values = logged("best", "eval/HasAns_f1")[:-1]  # the last one evaluates the model that is saved
    best = int(np.argmax(values)) + 1
    assert len(values) == min(6, best + 2), printed
    assert {path.name for path in checkpoints(folder)} == {f"checkpoint-{best}", f"checkpoint-{len(values)}"}
    if dist.is_rank_zero():
        saved = load_file(folder / "model.safetensors")
        weights = full_weights(folder / f"checkpoint-{best}")
        assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in saved)
        assert logged("best", "eval/HasAns_f1")[-1] == max(values)
        proof = json.loads((folder / "run.json").read_text())["proof"]
        assert proof["rows"] == 4 and proof["largest_difference"] <= 1e-5


def a_changed_batch_keeps_the_best_model() -> None:
    """Two steps count as one from there on, and go wrong: the best model is one of before, which the end takes."""
    watching = {
        "logging_steps": 2,
        "save_steps": 2,
        "save_total_limit": 1,
        "evaluate_during_training": True,
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
    }
    run("batch", "step 4/6", lambda: os.kill(os.getpid(), signal.SIGUSR1), **watching)
    printed = run(
        "batch",
        **watching,
        global_batch_size=16,
        learning_rate=0.3,
        resume_with_changes="global_batch_size,learning_rate",
    )
    assert "checkpoint-4.batch8, step 2 of 6" in printed, printed
    folder = FOLDER / "batch"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-4.batch8", "checkpoint-6"], printed
    if dist.is_rank_zero():
        saved, weights = load_file(folder / "model.safetensors"), full_weights(folder / "checkpoint-4.batch8")
        assert all(torch.equal(saved[name], weights[name]) for name in saved)
        losses_then = logged("batch", "eval/loss")
        assert losses_then[-1] == min(losses_then) < losses_then[-2]


def lines_of(act: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What `act` returns, and the lines of progress that it writes into a file."""
    with mock.patch.object(progress, "LINE_SECONDS", 0.0), contextlib.redirect_stderr(io.StringIO()) as written:
        result = act()
    return result, written.getvalue().splitlines()


def exports_are_verified_from_every_stage() -> None:
    """Float32 gives the engine's logits, bfloat16 the rounded weights, several files the same as one."""

    def check() -> None:
        for name, step in (("crossing", 1), ("changed", 4), ("whole", 6), ("crossing", 3)):  # stages 0, 1, 2, 3
            out = FOLDER / f"exported-{name}-{step}"
            out.mkdir()  # empty, as a mounted disk may be
            record = export(FOLDER / name / f"checkpoint-{step}", out)
            assert record["rows"] == 4 and record["largest_difference"] <= 1e-5, record
            full = load_file(out / "model.safetensors")
            halved, lines = lines_of(
                lambda checkpoint=FOLDER / name / f"checkpoint-{step}", out=out: export(
                    checkpoint, out / "bf16", "bf16", "200KB"
                )
            )
            stages = [line.split(":")[0] for line in lines]
            assert list(dict.fromkeys(stages)) == [
                f"checking checkpoint-{step}",
                "assembling weights",
                "saving the model",
                "comparing weights",
            ], lines
            assert all("/s" in line and line.endswith(" left") for line in lines), lines
            parts = [load_file(path) for path in (out / "bf16").glob("*.safetensors")]
            rounded = {key: value for part in parts for key, value in part.items()}
            assert len(parts) > 1 and halved["dtype"] == "bfloat16"
            assert rounded.keys() == full.keys()
            assert all(torch.equal(rounded[key], full[key].bfloat16()) for key in full)
        assert (FOLDER / "exported-whole-6/model.safetensors").read_bytes() == (
            FOLDER / "whole/model.safetensors"
        ).read_bytes()
        probe = load_reference_outputs(FOLDER / "whole/checkpoint-2", "fp32", "cpu")
        for state, words in ((full_weights(FOLDER / "whole/checkpoint-4"), "tensors differ"), (full, "logits differ")):
            try:
                verify_saved_model(out, state, probe)
            except UserError as error:
                assert words in str(error), error
            else:
                raise AssertionError(f"another model was taken for it: {words} was not seen")

    on_first(check)


STAGES = ("zero1", "zero2", "zero3")


def two_ranks_stop_in_mid_epoch() -> None:
    """The first part of 2 -> 1 -> 2 ranks."""
    for stage in STAGES:
        assert "preempted by" in stopping_at(2, f"ranks_{stage}", deepspeed_config=stage)


def one_rank_resumes_and_stops() -> None:
    """The second part, with two micro-batches where two ranks had one each."""
    for stage in STAGES:
        printed = stopping_at(4, f"ranks_{stage}", deepspeed_config=stage)
        assert (
            "8 rows a step = micro-batches of 4 x 2 accumulation steps x 1 rank" in printed and "step 2 of 6" in printed
        ), printed


def two_ranks_finish_what_one_resumed() -> None:
    """The third part: rows are those of the uninterrupted run, so losses and states are, to rounding."""
    for stage in STAGES:
        same_states("whole", f"ranks_{stage}", 4)
        run(f"ranks_{stage}", deepspeed_config=stage)
        same_states("whole", f"ranks_{stage}", 6)
        if dist.is_rank_zero():
            np.testing.assert_allclose(losses(FOLDER / f"ranks_{stage}"), losses(FOLDER / "whole"), rtol=1e-4)


SCENES = (
    damaged_checkpoints_are_named_and_passed_over,
    every_file_of_a_checkpoint_is_watched,
    nothing_starts_from_zero_in_silence,
    a_limit_keeps_the_last_ones,
    the_clock_saves_and_stops,
    a_signal_on_one_rank_stops_all_after_the_step,
    any_stage_resumes_from_any_other,
    changes_are_refused_by_name_unless_named,
    the_best_model_stays_and_is_the_end,
    a_changed_batch_keeps_the_best_model,
    exports_are_verified_from_every_stage,
    two_ranks_stop_in_mid_epoch,
)
LATER = (one_rank_resumes_and_stops, two_ranks_finish_what_one_resumed)


def main() -> None:
    """Play every scene after a whole run that they compare with."""
    dist.ensure_rank_env()
    run("whole")
    assert [path.name for path in checkpoints(FOLDER / "whole")] == [f"checkpoint-{step}" for step in (2, 4, 6)]
    asked = sys.argv[3:]
    for scene in [scene for scene in SCENES + LATER if scene.__name__ in asked] if asked else SCENES:
        scene()
        dist.log0(f"played: {scene.__name__}")
    dist.destroy()


if __name__ == "__main__":
    main()
