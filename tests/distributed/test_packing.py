"""Packed rows: the same losses and weights as padded ones, however the work is cut up, and after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qa_deepspeed.engine.checkpoints.checkpoint_files import read_loop_state
from tests.distributed.launching import logged, losses, run_many

pytestmark = pytest.mark.distributed

STEPS, SAVED = 10, 4
COMMON = {"max_steps": STEPS, "adam_epsilon": 1e-3, "weight_decay": 0.1, "global_batch_size": 8}
TWO_RANKS: dict[str, dict[str, object]] = {
    "packed": {"deepspeed_config": "zero2", "per_gpu_train_batch_size": 4},
    "padded": {"deepspeed_config": "zero2", "per_gpu_train_batch_size": 4, "batch_layout": "padded"},
    "packed_4x1": {"deepspeed_config": "zero1", "per_gpu_train_batch_size": 1},
    "packed_zero3": {"deepspeed_config": "zero3", "per_gpu_train_batch_size": 4},
    "packed_by_tokens": {"deepspeed_config": "zero0", "max_tokens_per_batch": 300, "per_gpu_train_batch_size": 4},
    "recomputed": {"deepspeed_config": "zero2", "per_gpu_train_batch_size": 4, "gradient_checkpointing": True},
    "grouped": {"deepspeed_config": "zero2", "per_gpu_train_batch_size": 4, "group_by_length": True},
}
ONE_RANK: dict[str, dict[str, object]] = {
    "alone": {"deepspeed_config": "zero2", "per_gpu_train_batch_size": 8},
    "alone_2x4": {"deepspeed_config": "zero0", "per_gpu_train_batch_size": 2},
}
SAME = [name for name in (*TWO_RANKS, *ONE_RANK) if name not in ("packed", "grouped")]


@pytest.fixture(scope="module")
def runs(base_options: dict[str, object], sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every run in a folder of its name; `dropped` has dropout, `resumed` continues it from a checkpoint,
    `old_order` one that knows nothing of layouts."""
    folder: Path = tmp_path_factory.mktemp("packing")
    base = {**base_options, **COMMON, "group_by_length": False}
    two = {name: {**base, **extra} for name, extra in TWO_RANKS.items()}
    with_dropout = {
        **base_options,
        "model_name_or_path": str(sample / "model"),
        "max_steps": STEPS,
        "save_steps": SAVED,
        "per_gpu_train_batch_size": 4,
        "deepspeed_config": "zero2",
    }
    two["dropped"] = with_dropout
    two["resumed"] = {**with_dropout, "resume_from_checkpoint": str(folder / "dropped" / f"checkpoint-{SAVED}")}
    two["by_padded_checkpoint"] = {**with_dropout, "batch_layout": "padded"}
    two["resumed_padded"] = {
        **with_dropout,
        "resume_from_checkpoint": str(folder / "by_padded_checkpoint" / f"checkpoint-{SAVED}"),
    }
    run_many(2, two, folder)
    run_many(1, {name: {**base, **extra} for name, extra in ONE_RANK.items()}, folder)
    run_many(
        3,
        {"three": {**base, "deepspeed_config": "zero2", "per_gpu_train_batch_size": 3, "global_batch_size": 9}},
        folder,
    )
    run_many(
        1,
        {"nine": {**base, "deepspeed_config": "zero2", "per_gpu_train_batch_size": 9, "global_batch_size": 9}},
        folder,
    )
    return folder


@pytest.mark.parametrize("name", SAME)
def test_losses_and_weights_equal_those_of_two_packed_ranks(runs: Path, name: str) -> None:
    np.testing.assert_allclose(losses(runs / name), losses(runs / "packed"), rtol=1e-5)
    expected, found = (load_file(runs / run / "model.safetensors") for run in ("packed", name))
    assert found.keys() == expected.keys()
    for weight in expected:
        np.testing.assert_allclose(found[weight], expected[weight], rtol=1e-4, atol=1e-6, err_msg=weight)


def test_three_ranks_equal_one(runs: Path) -> None:
    np.testing.assert_allclose(losses(runs / "three"), losses(runs / "nine"), rtol=1e-5)


def test_the_control_differs(runs: Path) -> None:
    """Other rows in each step: other losses."""
    assert np.abs(losses(runs / "grouped") / losses(runs / "packed") - 1).max() > 1e-3


def test_nothing_is_padded(runs: Path) -> None:
    assert max(logged(runs / "packed", "speed/padding")) == 0.0
    assert max(logged(runs / "padded", "speed/padding")) > 0.05


@pytest.mark.parametrize(("resumed", "whole"), [("resumed", "dropped"), ("resumed_padded", "by_padded_checkpoint")])
def test_a_resumed_run_ends_with_the_same_bits(runs: Path, resumed: str, whole: str) -> None:
    """With dropout, and in the layout and order of its checkpoint, also where these are not the defaults."""
    one, other = (load_file(runs / run / "model.safetensors") for run in (resumed, whole))
    assert all(np.array_equal(one[weight], other[weight]) for weight in one)
    np.testing.assert_array_equal(losses(runs / resumed), losses(runs / whole)[SAVED:])


def test_checkpoints_know_the_layout(runs: Path) -> None:
    packed, padded = (
        read_loop_state(runs / name / f"checkpoint-{SAVED}") for name in ("dropped", "by_padded_checkpoint")
    )
    assert (packed.packed, packed.group_by_length) == (True, False)
    assert (padded.packed, padded.group_by_length) == (False, True)
    assert "group_by_length" not in json.loads((runs / "dropped" / "run.json").read_text())["identity"]
