"""State on NVMe: trained, saved, resumed, exported and evaluated as at zero3, and no swap files left.

DeepSpeed keeps groups below 1 MiB in memory: the model here is wide enough that every kind of its files is written.
`launch/test.sh -m "slow or not slow" tests/distributed/test_nvme.py`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForQuestionAnswering, set_seed

from qa_deepspeed.engine.checkpoints.checkpoint import full_weights
from qa_deepspeed.engine.checkpoints.checkpoint_files import read_loop_state
from qa_deepspeed.engine.checkpoints.shards import Shards
from qa_deepspeed.engine.ds_config import load
from qa_deepspeed.engine.nvme.swap_files import swap_bytes
from tests.distributed.launching import alone, by_torchrun, environment, flags, kill_all, losses, run, run_many
from tests.paths import REPOSITORY

pytestmark = pytest.mark.distributed

STEPS, SAVED = 4, 2


@pytest.fixture(scope="module")
def options(
    base_options: dict[str, object], sample: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    """A run of a model of 2.3 million parameters; epsilon keeps Adam from making updates out of rounding."""
    folder: Path = tmp_path_factory.mktemp("wide")
    shutil.copytree(sample / "model", folder / "model")
    config = json.loads((folder / "model/config.json").read_text())
    set_seed(1)
    BertForQuestionAnswering(BertConfig(**config | {"intermediate_size": 4096})).save_pretrained(folder / "model")
    (folder / "nvme").mkdir()
    return {
        **base_options,
        "model_name_or_path": str(folder / "model"),
        "max_steps": STEPS,
        "save_steps": SAVED,
        "per_gpu_train_batch_size": 6,
        "adam_epsilon": 1e-3,
        "nvme_path": str(folder / "nvme"),
    }


def config_of(folder: Path, **offload_param: object) -> str:
    """zero3_nvme with small buffers, and other settings for the parameters."""
    config = load("zero3_nvme")
    config["zero_optimization"]["offload_param"] |= {"buffer_size": 2_000_000, **offload_param}
    path = folder / f"{'_'.join(['nvme', *offload_param])}.json"
    path.write_text(json.dumps(config))
    return str(path)


def after(run_folder: Path, step: int = SAVED) -> dict[str, object]:
    """Options that resume from a checkpoint of another folder."""
    return {"resume_from_checkpoint": str(run_folder / f"checkpoint-{step}")}


@pytest.fixture(scope="module")
def runs(options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of two ranks: at zero3, on NVMe, and resumed from each other's checkpoints."""
    folder: Path = tmp_path_factory.mktemp("nvme_runs")
    at_zero3 = {**options, "deepspeed_config": "zero3"}
    on_nvme = {**options, "deepspeed_config": config_of(folder)}
    parameters_too = {**options, "deepspeed_config": config_of(folder, max_in_cpu=0)}
    in_order = {
        "zero3": at_zero3,
        "nvme": on_nvme,
        "parameters": parameters_too,
        "nvme_resumed": on_nvme | after(folder / "nvme"),
        "parameters_resumed": parameters_too | after(folder / "parameters"),
        "nvme_from_zero3": on_nvme | after(folder / "zero3"),
        "zero3_from_nvme": at_zero3 | after(folder / "nvme"),
    }
    run_many(2, in_order, folder)
    return folder


@pytest.mark.parametrize("name", ["nvme", "parameters"])
def test_losses_and_weights_are_those_of_zero3(runs: Path, name: str) -> None:
    np.testing.assert_allclose(losses(runs / name), losses(runs / "zero3"), rtol=1e-5)
    assert np.ptp(losses(runs / name)) > 0.01
    ours, theirs = (load_file(runs / each / "model.safetensors") for each in (name, "zero3"))
    assert ours.keys() == theirs.keys()
    for weight in ours:
        torch.testing.assert_close(ours[weight], theirs[weight], rtol=1e-4, atol=1e-5)


def test_no_swap_files_are_left(runs: Path, options: dict[str, object]) -> None:
    assert list(Path(str(options["nvme_path"])).iterdir()) == []
    assert not list(runs.rglob("offloaded_tensors"))


@pytest.mark.parametrize("name", ["nvme", "parameters"])
def test_a_resumed_run_is_the_uninterrupted_one(runs: Path, name: str) -> None:
    resumed = runs / f"{name}_resumed"
    assert losses(resumed).tolist() == losses(runs / name)[SAVED:].tolist()
    assert (resumed / "model.safetensors").read_bytes() == (runs / name / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["nvme_from_zero3", "zero3_from_nvme"])
def test_state_is_carried_to_and_from_memory(runs: Path, name: str) -> None:
    np.testing.assert_allclose(losses(runs / name), losses(runs / "zero3")[SAVED:], rtol=1e-5)


def states(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Weight and moments of each parameter."""
    state = read_loop_state(checkpoint)
    shards = Shards(checkpoint, state.zero_stage, state.world_size, state.optimized, state.flat)
    assert shards.optimizer_step == state.step
    return {name: shards.read(name) for name in shards.names}


def test_checkpoints_hold_weights_and_moments_as_those_of_zero3(runs: Path) -> None:
    """Also of parameters that were on the disk when it was saved; exporting needs the shards alone."""
    expected = states(runs / f"zero3/checkpoint-{STEPS}")
    for name in ("nvme", "parameters"):
        found = states(runs / name / f"checkpoint-{STEPS}")
        assert found.keys() == expected.keys()
        for parameter, tensors in found.items():
            assert tensors.keys() == {"weight", "exp_avg", "exp_avg_sq"}
            for key, value in tensors.items():
                torch.testing.assert_close(value, expected[parameter][key], rtol=1e-3, atol=1e-5)
        model = load_file(runs / name / "model.safetensors")
        weights = full_weights(runs / name / f"checkpoint-{STEPS}")
        assert all(torch.equal(model[weight], weights[weight]) for weight in model)


@pytest.mark.slow
def test_adapters_train_beside_frozen_parameters_on_the_disk(options: dict[str, object], tmp_path: Path) -> None:
    """Saved, resumed and exported as at zero3."""
    adapters = {**options, "lora_rank": 4, "learning_rate": 1e-2, "deepspeed_config": config_of(tmp_path)}
    in_order = {"zero3": adapters | {"deepspeed_config": "zero3"}, "nvme": adapters}
    run_many(2, in_order | {"resumed": adapters | after(tmp_path / "nvme")}, tmp_path)
    np.testing.assert_allclose(losses(tmp_path / "nvme"), losses(tmp_path / "zero3"), rtol=1e-4)
    assert losses(tmp_path / "resumed").tolist() == losses(tmp_path / "nvme")[SAVED:].tolist()
    expected = full_weights(tmp_path / f"zero3/checkpoint-{STEPS}")
    for name, value in full_weights(tmp_path / f"nvme/checkpoint-{STEPS}").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_other_ranks_and_stages_resume(runs: Path, options: dict[str, object], tmp_path: Path) -> None:
    """2 -> 1 and 3 ranks on NVMe, NVMe -> zero2 -> NVMe. The global batch stays, so losses do."""
    on_nvme = {**options, "deepspeed_config": config_of(tmp_path)}
    at_zero2 = {**options, "deepspeed_config": "zero2", "save_steps": 1}
    run_many(1, {"one": on_nvme | after(runs / "nvme"), "zero2": at_zero2 | after(runs / "nvme")}, tmp_path)
    run_many(3, {"three": on_nvme | after(runs / "nvme")}, tmp_path)
    run_many(2, {"back": on_nvme | after(tmp_path / "zero2", SAVED + 1)}, tmp_path)
    for name, step in (("one", SAVED), ("zero2", SAVED), ("three", SAVED), ("back", SAVED + 1)):
        np.testing.assert_allclose(losses(tmp_path / name), losses(runs / "nvme")[step:], rtol=1e-4)


def killed_when(path: Path, command: list[str], folder: Path) -> None:
    """Start a run and kill all of it when a file appears; the last word of the command is in no other."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None and path.exists(), "it ended before it could be killed"
    kill_all(command[-1])
    process.wait()


@pytest.mark.slow
def test_a_killed_run_resumes_and_leaves_nothing(runs: Path, options: dict[str, object], tmp_path: Path) -> None:
    """Its swap files are there after the kill, are removed at the next start, and so are the new ones at the end."""
    nvme = tmp_path / "disk"
    nvme.mkdir()
    given: dict[str, Any] = {**options, "deepspeed_config": config_of(tmp_path), "nvme_path": str(nvme)}
    arguments = flags(**given, output_dir=str(tmp_path / "killed"))
    killed_when(tmp_path / f"killed/checkpoint-{SAVED}", by_torchrun(2, "train", *arguments), tmp_path)
    (left,) = nvme.iterdir()
    size = sum(tensor.numel() for tensor in load_file(runs / "nvme/model.safetensors").values())
    model: Any = SimpleNamespace(parameters=size, trained=size)
    (planned,) = swap_bytes(load(str(given["deepspeed_config"])), model, 4).values()
    assert 0.8 * planned < sum(path.stat().st_size for path in left.rglob("*.swp")) <= planned
    done = run(by_torchrun(2, "train", *arguments), tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"removed swap files of an interrupted run: {left}" in done.stdout
    assert list(nvme.iterdir()) == []
    assert losses(tmp_path / "killed")[-SAVED:].tolist() == losses(runs / "nvme")[SAVED:].tolist()


@pytest.mark.slow
def test_the_shipped_config_exports_and_evaluates(options: dict[str, object], tmp_path: Path) -> None:
    """By the commands, one rank."""
    given = {**options, "deepspeed_config": "zero3_nvme"}
    done = run(alone("train", *flags(**given, output_dir=str(tmp_path / "run"))), tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    done = run(alone("export", str(tmp_path / f"run/checkpoint-{STEPS}"), str(tmp_path / "exported")), tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ours, theirs = (load_file(tmp_path / each / "model.safetensors") for each in ("exported", "run"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    given = {name: given[name] for name in ("predict_file", "cache_dir", "version_2_with_negative", "nvme_path")}
    scores = []
    for config in ("zero0", "zero3_nvme"):
        given |= {"deepspeed_config": config, "model_name_or_path": str(tmp_path / "exported")}
        done = run(alone("evaluate", *flags(**given, output_dir=str(tmp_path / config))), tmp_path)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        scores.append(json.loads((tmp_path / config / "metrics.json").read_text()))
    assert scores[0] == scores[1]
    assert list(Path(str(options["nvme_path"])).iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_is_one_line(options: dict[str, object], tmp_path: Path) -> None:
    """A limit on the size of files stands for it: checkpoints are off, the feature files are there already."""
    given = {**options, "deepspeed_config": config_of(tmp_path), "save_steps": 0}
    command = alone("train", *flags(**given, output_dir=str(tmp_path / "full")))
    done = run(["bash", "-c", 'ulimit -f 4000; exec "$0" "$@"', *command], REPOSITORY)
    assert done.returncode != 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "error: cannot write" in done.stdout + done.stderr and "File too large" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert list(Path(str(options["nvme_path"])).iterdir()) == []
