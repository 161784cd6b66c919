"""Checkpoints written in the background: the same files, a kill at any moment, a resume that changes nothing."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qa_deepspeed.engine.checkpoints.checkpoint_files import checkpoints, verify_checkpoint
from qa_deepspeed.engine.deepspeed_compat import plain_values_only
from tests.distributed.launching import environment, free_port, kill_all, run_many
from tests.paths import REPOSITORY

pytestmark = pytest.mark.distributed

STEPS = 6
KINDS: dict[str, dict[str, object]] = {
    "zero0_bf16": {"deepspeed_config": "zero0", "bf16": True},
    "zero1": {"deepspeed_config": "zero1"},
    "zero2": {"deepspeed_config": "zero2"},
    "zero3": {"deepspeed_config": "zero3"},
}


@pytest.fixture(scope="module")
def options(base_options: dict[str, object], sample: Path) -> dict[str, object]:
    """With dropout; a checkpoint after every second step."""
    return {
        **base_options,
        "model_name_or_path": str(sample / "model"),
        "max_steps": STEPS,
        "save_steps": 2,
        "per_gpu_train_batch_size": 4,
    }


@pytest.fixture(scope="module")
def runs(options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each run as KIND/background, KIND/at_once, and KIND/resumed from a checkpoint of the first."""
    folder: Path = tmp_path_factory.mktemp("async")
    wanted: dict[str, dict[str, object]] = {}
    for kind, extra in KINDS.items():
        wanted[f"{kind}/background"] = {**options, **extra, "save_async": "true"}
        wanted[f"{kind}/at_once"] = {**options, **extra, "save_async": "false"}
        first = str(folder / kind / "background" / "checkpoint-2")
        wanted[f"{kind}/resumed"] = {**options, **extra, "save_async": "true", "resume_from_checkpoint": first}
    run_many(2, wanted, folder)
    return folder


def contents(checkpoint: Path) -> dict[str, Any]:
    """What DeepSpeed's files hold."""
    with plain_values_only():
        return {path.name: torch.load(path, weights_only=True) for path in sorted(checkpoint.glob("*.pt"))}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or not isinstance(one, (int, float, str, bool)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_hold_what_a_save_at_once_writes(runs: Path, kind: str) -> None:
    found, expected = (checkpoints(runs / kind / way) for way in ("background", "at_once"))
    assert [path.name for path in found] == [path.name for path in expected] and len(found) >= 2
    for one, other in zip(found, expected, strict=True):
        assert verify_checkpoint(one) is None
        theirs = contents(other)
        assert theirs and same(contents(one), theirs), one.name


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_as_the_uninterrupted_one(runs: Path, kind: str) -> None:
    expected, found = (load_file(runs / kind / way / "model.safetensors") for way in ("background", "resumed"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_kill_during_a_write_leaves_the_last_complete_checkpoint(
    options: dict[str, object], runs: Path, tmp_path: Path
) -> None:
    """The second checkpoint never completes; the same command resumes from the first, and ends as if uninterrupted."""
    (tmp_path / "runs.json").write_text(json.dumps({"run": {**options, **KINDS["zero1"], "save_async": "true"}}))
    command = ["torchrun", "--nproc_per_node", "2", "--master_port", free_port(), "-m"]
    command += ["tests.distributed.stuck_save_worker", str(tmp_path / "runs.json"), str(tmp_path)]
    stuck = tmp_path / "run" / "stuck"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not stuck.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        assert stuck.exists(), (tmp_path / "log").read_text()[-3000:]
        kill_all(str(tmp_path / "runs.json"))
        process.wait()
    left = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert left == {"checkpoint-2", "checkpoint-4.partial"}
    assert verify_checkpoint(tmp_path / "run" / "checkpoint-2") is None
    run_many(2, {"run": {**options, **KINDS["zero1"], "save_async": "true"}}, tmp_path)
    expected = load_file(runs / "zero1" / "background" / "model.safetensors")
    found = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
