"""The same loss in every step and the same weights, however the work is cut up: ZeRO stage, ranks, micro-batches.

60 rows in global batches of 8 over 20 steps: every eighth step is a partial batch of 4 rows, and a third epoch begins.
Adam's epsilon is large: with a small one, Adam makes rounding noise in parameters without a gradient (the bias of the
head shifts all logits alike) as large as the learning rate.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import get_scheduler

from qa_deepspeed.config.option_groups import SCHEDULES
from tests.distributed.launching import logged, losses, run_many

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, SCHEDULED_STEPS = 20, 8
TWO_RANKS = {
    "zero0": {"deepspeed_config": "zero0"},
    "zero1": {"deepspeed_config": "zero1"},
    "zero2": {"deepspeed_config": "zero2"},
    "zero3": {"deepspeed_config": "zero3"},
    "zero2_offload": {"deepspeed_config": "zero2_offload"},
    "zero3_offload": {"deepspeed_config": "zero3_offload"},
    "zero2_accumulated": {"deepspeed_config": "zero2", "per_gpu_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "zero1_by_tokens": {"deepspeed_config": "zero1", "max_tokens_per_batch": 384},
    "zero3_by_tokens": {"deepspeed_config": "zero3", "max_tokens_per_batch": 240},
    "zero2_autocast": {"deepspeed_config": "zero2_autocast"},
    "zero2_recomputed": {"deepspeed_config": "zero2", "gradient_checkpointing": True},
    "zero0_marginal_of_one": {"deepspeed_config": "zero0", "answers": "all", "objective": "marginal"},
    "other_rate": {"deepspeed_config": "zero2", "learning_rate": 1.3e-3},
}
IN_BF16 = {"bf16": True, "per_gpu_train_batch_size": 8, "batch_layout": "padded"}
ONE_RANK = {
    "alone_8x1": {"deepspeed_config": "zero2", "per_gpu_train_batch_size": 8},
    "alone_4x2": {"deepspeed_config": "zero0", "per_gpu_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "alone_1x8": {"deepspeed_config": "zero3", "per_gpu_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "alone_bf16_zero0": {"deepspeed_config": "zero0", **IN_BF16},
    "alone_bf16_zero1": {"deepspeed_config": "zero1", **IN_BF16},
}
WITH_SECRETS = {
    "zero_optimization": {"stage": 2},
    "comet": {"enabled": False, "api_key": "s3cret-1", "workspace": "mine"},
}
HALF = ("alone_bf16_zero0", "alone_bf16_zero1")


@pytest.fixture(scope="module")
def runs(base_options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every run in a folder of its name."""
    folder: Path = tmp_path_factory.mktemp("equivalence")
    (folder / "ds.json").write_text(json.dumps(WITH_SECRETS))
    base_options = {**base_options, "max_steps": STEPS, "adam_epsilon": 1e-3}
    two = {name: {**base_options, "per_gpu_train_batch_size": 4, **extra} for name, extra in TWO_RANKS.items()}
    short = {
        **base_options,
        "per_gpu_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "deepspeed_config": "zero2",
    }
    for name in SCHEDULES:
        two[name] = {**short, "max_steps": SCHEDULED_STEPS, "warmup_steps": 3, "lr_scheduler_type": name}
    run_many(2, two, folder)
    one = {name: {**base_options, **extra} for name, extra in ONE_RANK.items()}
    one["alone_8x1"] |= {"deepspeed_config": str(folder / "ds.json"), "save_steps": STEPS}
    run_many(1, one, folder)
    return folder


@pytest.fixture(scope="module")
def loss_of(runs: Path) -> dict[str, np.ndarray]:
    """The losses of every run."""
    return {name: losses(runs / name) for name in [*TWO_RANKS, *ONE_RANK]}


EQUAL = [name for name in [*TWO_RANKS, *ONE_RANK] if name not in ("zero0", "other_rate", "zero2_autocast", *HALF)]


@pytest.mark.parametrize("name", EQUAL)
def test_saved_models_are_whole_and_equal(runs: Path, name: str) -> None:
    """GatheredOutputs from any stage: every weight is there, by the same name."""
    expected, found = (load_file(runs / run / "model.safetensors") for run in ("zero0", name))
    assert found.keys() == expected.keys()
    for weight in expected:
        np.testing.assert_allclose(found[weight], expected[weight], rtol=1e-4, atol=1e-6, err_msg=weight)


@pytest.mark.parametrize("name", EQUAL)
def test_losses_equal_zero0_on_two_ranks(loss_of: dict[str, np.ndarray], name: str) -> None:
    assert len(loss_of[name]) == STEPS
    np.testing.assert_allclose(loss_of[name], loss_of["zero0"], rtol=1e-5)


def test_lower_precision_inside_the_operations_comes_near(loss_of: dict[str, np.ndarray]) -> None:
    """bfloat16 has 8 bits: not the same, and not another run."""
    assert 1e-5 < np.abs(loss_of["zero2_autocast"] / loss_of["zero0"] - 1).max() < 2e-2


def test_half_precision_trains_alike_at_zero0_and_zero1(loss_of: dict[str, np.ndarray]) -> None:
    """DeepSpeed's stage 0 counts a step on zero gradients as Adam's first; the engine takes it back.

    Later the two stages differ by where they round to bfloat16.
    """
    zero0, zero1 = (loss_of[name] for name in HALF)
    np.testing.assert_allclose(zero0[:5], zero1[:5], rtol=1e-6)
    np.testing.assert_allclose(zero0, zero1, rtol=5e-3)


def test_secrets_of_the_config_are_in_no_file_of_the_run(runs: Path) -> None:
    files = [path for path in (runs / "alone_8x1").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"run.json", "loop.json", "mp_rank_00_model_states.pt"} <= names
    assert not [path for path in files if b"s3cret" in path.read_bytes()]
    assert "(redacted)" in (runs / "alone_8x1/run.json").read_text()


def test_the_control_differs(loss_of: dict[str, np.ndarray]) -> None:
    """Another learning rate changes the losses by far more than the tolerance: the comparison can fail."""
    assert np.abs(loss_of["other_rate"] / loss_of["zero0"] - 1).max() > 1e-3


def test_the_control_saves_other_weights(runs: Path) -> None:
    one, other = (load_file(runs / run / "model.safetensors") for run in ("zero0", "other_rate"))
    assert max(np.abs(one[weight] - other[weight]).max() for weight in one) > 1e-3


def test_the_runs_learn(loss_of: dict[str, np.ndarray]) -> None:
    assert loss_of["zero0"][-3:].mean() < loss_of["zero0"][:3].mean() - 0.1


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_those_of_get_scheduler(runs: Path, name: str) -> None:
    """Step for step, under accumulation and on two ranks."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_scheduler(name, optimizer, 3, SCHEDULED_STEPS)
    expected = []
    for _ in range(SCHEDULED_STEPS):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(logged(runs / name, "train/learning_rate"), expected, rtol=1e-12)
