"""Graphs under DeepSpeed: losses and weights of a run are those of an ordinary forward and backward pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.distributed.launching import logged, losses, run_many

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ALONE: dict[str, dict[str, object]] = {
    "zero0": {"deepspeed_config": "zero0"},
    "zero1_bf16": {"deepspeed_config": "zero1", "bf16": True},
    "zero2": {"deepspeed_config": "zero2"},
    "zero1_accumulated": {"deepspeed_config": "zero1", "gradient_accumulation_steps": 2},
    "zero2_accumulated": {"deepspeed_config": "zero2", "gradient_accumulation_steps": 2},
    "zero0_bf16_accumulated": {"deepspeed_config": "zero0", "bf16": True, "gradient_accumulation_steps": 2},
    "by_tokens": {"deepspeed_config": "zero1", "max_tokens_per_batch": 300},
    "lora": {"deepspeed_config": "zero1", "lora_rank": 2},
}
TWO_RANKS: dict[str, dict[str, object]] = {
    "zero1_two": {"deepspeed_config": "zero1"},
    "zero2_two_accumulated": {"deepspeed_config": "zero2", "gradient_accumulation_steps": 2},
}


@pytest.fixture(scope="module")
def runs(base_options: dict[str, object], sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each run twice, as NAME/graphs and NAME/plain; with dropout."""
    folder: Path = tmp_path_factory.mktemp("graphs")
    options = {
        **base_options,
        "model_name_or_path": str(sample / "model"),
        "max_steps": 5,
        "logging_steps": 1,
        "per_gpu_train_batch_size": 4,
    }
    for ranks, table in ((1, ALONE), (2, TWO_RANKS)):
        wanted = {
            f"{name}/{kind}": {**options, **extra, "cuda_graphs": "true" if kind == "graphs" else "false"}
            for name, extra in table.items()
            for kind in ("graphs", "plain")
        }
        run_many(ranks, wanted, folder, "graphs_worker")
    return folder


@pytest.mark.parametrize("name", [*ALONE, *TWO_RANKS])
def test_runs_are_those_without_graphs(runs: Path, name: str) -> None:
    """Bit by bit on one rank; to rounding on two, where the mean over ranks is taken in another place."""
    graphs, plain = runs / name / "graphs", runs / name / "plain"
    tolerance = {"rtol": 0.0, "atol": 0.0} if name in ALONE else {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(losses(graphs), losses(plain), **tolerance)
    np.testing.assert_allclose(logged(graphs, "train/grad_norm"), logged(plain, "train/grad_norm"), **tolerance)
    (weights,) = graphs.glob("*.safetensors")
    expected, found = load_file(plain / weights.name), load_file(weights)
    for weight, value in expected.items():
        np.testing.assert_allclose(found[weight].float(), value.float(), **tolerance, err_msg=weight)
