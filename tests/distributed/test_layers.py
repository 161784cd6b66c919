"""Two ranks with frozen layers and learning rates by layer: the same run at every ZeRO stage, resumed too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qa_deepspeed.engine.checkpoints.checkpoint import full_weights
from tests.distributed.launching import losses, run_many

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, SAVED = 6, 3
WITHOUT_GRADIENT = ("qa_outputs.bias", "layer.1.output.LayerNorm.bias", "key.bias")
"""The softmax cancels them: their gradients are rounding alone, which Adam scales up."""

STAGES = ("zero0", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def runs(base_options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each stage and one without flat parameters, and runs resumed at another stage."""
    folder: Path = tmp_path_factory.mktemp("layers")
    by_layer = {
        **base_options,
        "max_steps": STEPS,
        "save_steps": SAVED,
        "per_gpu_train_batch_size": 2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "layerwise_lr_decay": 0.7,
        "freeze": "embeddings,0",
    }
    of_stage: dict[str, dict[str, object]] = {stage: {**by_layer, "deepspeed_config": stage} for stage in STAGES}
    runs = {stage: of_stage[stage] for stage in ("zero0", "zero1", "zero2")}
    runs["plain"] = {**of_stage["zero2"], "flat_parameters": False}
    runs["uniform"] = {**of_stage["zero2"], "layerwise_lr_decay": 1.0}
    for theirs, ours in (("zero2", "zero2"), ("zero2", "zero0"), ("zero0", "zero3"), ("zero3", "zero1")):
        if ours == "zero3":  # after the others: it leaves other kernels for linear layers in the process
            runs["zero3"] = of_stage["zero3"]
        checkpoint = str(folder / theirs / f"checkpoint-{SAVED}")
        runs[f"{ours}_from_{theirs}"] = {**of_stage[ours], "resume_from_checkpoint": checkpoint}
    run_many(2, runs, folder)
    return folder


def test_every_stage_trains_the_same_layers(runs: Path, base_options: dict[str, object]) -> None:
    first, base = losses(runs / "zero0"), load_file(Path(str(base_options["model_name_or_path"])) / "model.safetensors")
    expected = load_file(runs / "zero0" / "model.safetensors")
    for stage in (*STAGES, "plain"):
        np.testing.assert_allclose(losses(runs / stage), first, rtol=1e-5)
        weights = load_file(runs / stage / "model.safetensors")
        exported = full_weights(runs / stage / f"checkpoint-{STEPS}")
        for name, value in weights.items():
            frozen = ".embeddings." in name or ".layer.0." in name
            assert torch.equal(value, base[name]) == frozen, (stage, name)
            assert torch.equal(exported[name], value), (stage, name)
            if not name.endswith(WITHOUT_GRADIENT):
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert not np.allclose(losses(runs / "uniform"), first, rtol=1e-5)


@pytest.mark.parametrize("name", ["zero2_from_zero2", "zero0_from_zero2", "zero3_from_zero0", "zero1_from_zero3"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(runs: Path, name: str) -> None:
    np.testing.assert_allclose(losses(runs / name), losses(runs / "zero0")[SAVED:], rtol=1e-5)
    if name == "zero2_from_zero2":
        assert losses(runs / name).tolist() == losses(runs / "zero2")[SAVED:].tolist()
