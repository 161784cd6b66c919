"""`train` and `evaluate` called from Python: as often as wanted in one process, with the results of the commands."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import alone, flags, free_port, run
from tests.paths import REPOSITORY

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def options(base_options: dict[str, object]) -> dict[str, object]:
    return {**base_options, "do_eval": True, "deepspeed_config": "zero2", "save_steps": 8, "eval_steps": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("python")


@pytest.fixture(scope="module")
def found(options: dict[str, object], folder: Path) -> dict[str, Any]:
    """What the calls in one process returned, and the run of the command in `folder`/command."""
    outcome = outcome_of([sys.executable], folder, options)
    commanded = run(alone("train", *flags(**options, output_dir=folder / "command")), folder)
    assert commanded.returncode == 0, commanded.stdout[-3000:] + commanded.stderr[-3000:]
    return outcome


def outcome_of(starter: list[str], folder: Path, options: dict[str, object]) -> dict[str, Any]:
    called = run([*starter, "-m", "tests.distributed.python_calls", str(folder), json.dumps(options)], REPOSITORY)
    assert called.returncode == 0, called.stdout[-3000:] + called.stderr[-3000:]
    (line,) = (line for line in called.stdout.splitlines() if line.startswith("{"))
    outcome: dict[str, Any] = json.loads(line)
    return outcome


def losses(history: list[dict[str, float]]) -> dict[int, float]:
    return {int(entry["step"]): entry["train/loss"] for entry in history if "train/loss" in entry}


def test_two_calls_in_one_process_give_what_the_command_gives(found: dict[str, Any], folder: Path) -> None:
    """The second was interrupted, and resumed by another call."""
    metrics = json.loads((folder / "command/metrics.json").read_text())
    lines = [json.loads(line) for line in (folder / "command/metrics.jsonl").read_text().splitlines()]
    weights = (folder / "command/model.safetensors").read_bytes()
    for name in ("first", "second"):
        assert found[name]["metrics"] == metrics and found[name]["folder"] == str(folder / name)
        assert losses(found[name]["history"]) == losses(lines) and len(losses(lines)) == 12
        assert (folder / name / "model.safetensors").read_bytes() == weights


def test_a_finished_run_returns_its_result_again(found: dict[str, Any]) -> None:
    assert found["again"] == found["first"]
    f1 = found["first"]["metrics"]["f1"]
    assert f"F1 {f1:.2f}" in found["first"]["repr"] and "first: EM " in found["first"]["repr"]


def test_an_evaluation_of_the_model_has_the_scores_of_the_run(found: dict[str, Any]) -> None:
    metrics = found["evaluated"]["metrics"]
    assert {name: metrics[name] for name in ("exact", "f1", "total")} == {
        name: found["first"]["metrics"][name] for name in ("exact", "f1", "total")
    }
    assert found["evaluated"]["folder"] == "None" and found["evaluated"]["history"] == []


def test_mistakes_and_ctrl_c_are_exceptions(found: dict[str, Any]) -> None:
    assert found["unknown"] == "unknown option 'learning_rat' in the arguments; did you mean 'learning_rate'?"
    assert "nowhere.json" in found["no file"]
    assert found["preempted"] == "preempted by SIGINT after step 3 of 12; the same command resumes"


def test_the_process_is_left_as_it_was(found: dict[str, Any]) -> None:
    """No variables of a rank, which programs started later would take for theirs, and the handlers of before."""
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & set(found["variables"])
    assert found["handlers kept"]


def test_no_model_of_an_earlier_call_stays_in_memory(found: dict[str, Any]) -> None:
    """After a run, an interrupted one, and runs and evaluations at ZeRO-1 to 3."""
    assert found["models"] == [0, 0, 0, 0]


def test_callbacks_are_called_with_steps_and_values(found: dict[str, Any]) -> None:
    calls, history = found["called"], found["first"]["history"]
    assert {step: loss for kind, step, loss in calls if kind == "log"} == losses(history)
    scored = {entry["step"]: entry["eval/f1"] for entry in history if "eval/f1" in entry}
    assert {step: f1 for kind, step, f1 in calls if kind == "evaluate"} == scored and set(scored) == {6, 12}
    assert [call[1:] for call in calls if call[0] == "save"] == [[8, "checkpoint-8"], [12, "first"]]


@pytest.mark.slow
def test_ranks_of_a_launcher_make_the_same_calls(options: dict[str, object], tmp_path: Path) -> None:
    starter = ["torchrun", "--nproc_per_node", "2", "--master_port", free_port()]
    found = outcome_of(starter, tmp_path, options)
    assert losses(found["first"]["history"]) == losses(found["second"]["history"])
    assert found["first"]["metrics"] == found["second"]["metrics"] == found["again"]["metrics"]
    assert found["evaluated"]["metrics"]["f1"] == found["first"]["metrics"]["f1"]
    assert "preempted by SIGINT after step 3" in found["preempted"] and found["models"] == [0, 0, 0, 0]
