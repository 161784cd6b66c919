"""Two ranks with flat parameters and without: the same losses, weights and optimizer state, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qa_deepspeed.engine.checkpoints.checkpoint_files import read_loop_state
from qa_deepspeed.engine.checkpoints.shards import Shards
from tests.distributed.launching import losses, run_many

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, SAVED = 6, 3
STAGES = ("zero0", "zero1", "zero2", "zero0_bf16", "zero2_bf16")


@pytest.fixture(scope="module")
def runs(base_options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every run in a folder of its name; `*_from_*` resume the checkpoint of the other kind."""
    folder: Path = tmp_path_factory.mktemp("flat")
    both = {
        **base_options,
        "max_steps": STEPS,
        "save_steps": SAVED,
        "per_gpu_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "weight_decay": 0.1,
        "max_grad_norm": 0,
    }
    runs = {}
    for stage in STAGES:
        config, *half = stage.split("_")
        flat = {**both, "deepspeed_config": config, "bf16": bool(half)}
        plain = {**flat, "flat_parameters": False}
        of_flat, of_plain = (str(folder / f"{kind}_{stage}" / f"checkpoint-{SAVED}") for kind in ("flat", "plain"))
        runs |= {
            f"flat_{stage}": flat,
            f"plain_{stage}": plain,
            f"flat_from_plain_{stage}": {**flat, "resume_from_checkpoint": of_plain},
            f"plain_from_flat_{stage}": {**plain, "resume_from_checkpoint": of_flat},
            f"flat_from_flat_{stage}": {**flat, "resume_from_checkpoint": of_flat},
        }
    runs["clipped_flat"] = {**both, "max_grad_norm": 0.5, "deepspeed_config": "zero2"}
    runs["clipped_plain"] = {**runs["clipped_flat"], "flat_parameters": False}
    adafactor = folder / "adafactor.json"
    adafactor.write_text(
        json.dumps({"zero_optimization": {"stage": 0}, "optimizer": {"type": "Adafactor", "params": {}}})
    )
    for kind in ("flat", "plain"):
        runs[f"adafactor_{kind}"] = {**both, "deepspeed_config": str(adafactor), "flat_parameters": kind == "flat"}
    runs["recomputed"] = {**runs["flat_zero2"], "gradient_checkpointing": True}
    run_many(2, runs, folder)
    return folder


def optimizer_state(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and moments of every tensor, from the last checkpoint's shards."""
    checkpoint = run / f"checkpoint-{STEPS}"
    state = read_loop_state(checkpoint)
    shards = Shards(checkpoint, state.zero_stage, state.world_size, state.optimized, state.flat)
    return {name: shards.read(name) for name in shards.names}


@pytest.mark.parametrize("stage", STAGES)
def test_losses_weights_and_optimizer_state_are_equal(runs: Path, stage: str) -> None:
    flat, plain = runs / f"flat_{stage}", runs / f"plain_{stage}"
    assert losses(flat).tolist() == losses(plain).tolist() and len(losses(flat)) == STEPS
    weights = load_file(plain / "model.safetensors")
    for name, value in load_file(flat / "model.safetensors").items():
        assert torch.equal(value, weights.pop(name)), name
    assert not weights
    expected, found = optimizer_state(plain), optimizer_state(flat)
    assert read_loop_state(flat / f"checkpoint-{STEPS}").flat and found.keys() == expected.keys()
    for name, state in expected.items():
        assert state.keys() == found[name].keys() and len(state) == 3, name
        assert all(torch.equal(found[name][key], value) for key, value in state.items()), name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["flat_from_plain", "plain_from_flat", "flat_from_flat"])
def test_a_checkpoint_of_the_other_kind_resumes_to_the_bit(runs: Path, stage: str, kind: str) -> None:
    expected = losses(runs / f"plain_{stage}")
    assert losses(runs / f"{kind}_{stage}").tolist() == expected[SAVED:].tolist()
    weights = load_file(runs / f"plain_{stage}" / "model.safetensors")
    for name, value in load_file(runs / f"{kind}_{stage}" / "model.safetensors").items():
        assert torch.equal(value, weights[name]), name


def test_clipping_differs_by_the_rounding_of_the_norm_alone(runs: Path) -> None:
    np.testing.assert_allclose(losses(runs / "clipped_flat"), losses(runs / "clipped_plain"), rtol=2e-6)


def test_an_optimizer_that_works_on_matrices_gets_them(runs: Path) -> None:
    assert losses(runs / "adafactor_flat").tolist() == losses(runs / "adafactor_plain").tolist()


def test_recomputed_activations_change_nothing(runs: Path) -> None:
    assert losses(runs / "recomputed").tolist() == losses(runs / "flat_zero2").tolist()
