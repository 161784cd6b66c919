"""Training with dropout on two ranks: masks follow seed, step, micro-batch and rank, and nothing else.

So a run that resumes, recomputes activations or evaluates on its way has the losses and weights of one that does not,
to the bit. The model has no head: it is drawn from the seed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.distributed.launching import logged, losses, run_many

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, SAVED = 8, 4
NOT_TRAINED = {"learning_rate": 0.0, "max_steps": 1}
HEAD = ("qa_outputs.weight", "qa_outputs.bias")


@pytest.fixture(scope="module")
def runs(sample: Path, base_options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every run in a folder of its name."""
    folder: Path = tmp_path_factory.mktemp("dropout")
    model = folder / "model"
    shutil.copytree(sample / "model", model)
    config = json.loads((model / "config.json").read_text())
    config.update(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    (model / "config.json").write_text(json.dumps(config))
    weights = load_file(model / "model.safetensors")
    save_file(
        {name: weights[name] for name in weights if name not in HEAD}, model / "model.safetensors", {"format": "pt"}
    )
    plain = {
        **base_options,
        "model_name_or_path": str(model),
        "max_steps": STEPS,
        "per_gpu_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "deepspeed_config": "zero2",
        "max_eval_examples": 20,
    }
    checkpoint = folder / "plain" / f"checkpoint-{SAVED}"
    two = {
        "plain": {**plain, "save_steps": SAVED},
        "resumed": {**plain, "resume_from_checkpoint": str(checkpoint)},
        "recomputed": {**plain, "gradient_checkpointing": True},
        "evaluated": {**plain, "evaluate_during_training": True, "logging_steps": 2},
        "evaluated_zero3": {**plain, "evaluate_during_training": True, "deepspeed_config": "zero3"},
        "plain_zero3": {**plain, "deepspeed_config": "zero3"},
        "other_seed": {**plain, **NOT_TRAINED, "seed": 43},
        "same_seed": {**plain, **NOT_TRAINED},
        "same_seed_zero3": {**plain, **NOT_TRAINED, "deepspeed_config": "zero3"},
    }
    run_many(2, two, folder, worker="masked_worker")
    return folder


def masks(runs: Path, name: str) -> list[list[str]]:
    """What each rank drew in a run."""
    return [json.loads((runs / f"{name}.masks-{rank}.json").read_text()) for rank in range(2)]


def weights_of(runs: Path, name: str) -> dict[str, np.ndarray]:
    """The weights that a run saved."""
    return load_file(runs / name / "model.safetensors")


def assert_same_weights(runs: Path, name: str, other: str) -> None:
    """Two runs ended with the same weights, to the bit."""
    found, expected = weights_of(runs, name), weights_of(runs, other)
    assert found.keys() == expected.keys()
    assert not [weight for weight in expected if not np.array_equal(found[weight], expected[weight])]


def test_masks_differ_by_step_micro_batch_and_rank(runs: Path) -> None:
    """No mask is drawn twice in a run: not in one forward pass, nor in another."""
    drawn = masks(runs, "plain")
    assert len(drawn[0]) == len(drawn[1]) >= 4 * 2 * STEPS  # several in each forward pass
    together = [*drawn[0], *drawn[1]]
    assert len(set(together)) == len(together)
    assert 0.7 < np.mean([bit == "1" for mask in together for bit in mask]) < 0.9


def test_dropout_changes_the_losses(runs: Path) -> None:
    """The control: the losses of another seed's masks differ by far more than rounding."""
    one, other = (losses(runs / name) for name in ("same_seed", "other_seed"))
    assert abs(float(one[0] / other[0]) - 1) > 1e-3


def test_another_seed_draws_other_masks(runs: Path) -> None:
    for one, other in zip(masks(runs, "same_seed"), masks(runs, "other_seed"), strict=True):
        assert len(one) == len(other) > 4 and not set(one) & set(other)


@pytest.mark.parametrize("name", ["resumed"])
def test_a_resumed_run_draws_the_masks_of_the_steps_that_are_left(runs: Path, name: str) -> None:
    np.testing.assert_array_equal(losses(runs / name), losses(runs / "plain")[SAVED:])
    assert_same_weights(runs, name, "plain")
    for resumed, plain in zip(masks(runs, name), masks(runs, "plain"), strict=True):
        assert 0.4 < len(resumed) / len(plain) < 0.6  # a batch with less padding may need fewer masks
        assert resumed == plain[-len(resumed) :]


def test_recomputed_activations_have_the_same_masks(runs: Path) -> None:
    np.testing.assert_allclose(losses(runs / "recomputed"), losses(runs / "plain"), rtol=1e-6)
    for recomputed, plain in zip(masks(runs, "recomputed"), masks(runs, "plain"), strict=True):
        assert set(recomputed) == set(plain) and len(recomputed) > len(plain)


@pytest.mark.parametrize("suffix", ["", "_zero3"])
def test_an_evaluation_on_the_way_does_not_change_the_training(runs: Path, suffix: str) -> None:
    """Dropout is off in the evaluation and on again after it, and its masks do not depend on what came before."""
    plain, evaluated = runs / f"plain{suffix}", runs / f"evaluated{suffix}"
    assert len(logged(evaluated, "eval/f1")) >= 3
    assert_same_weights(runs, evaluated.name, plain.name)
    assert masks(runs, evaluated.name) == masks(runs, plain.name)
    if suffix:
        np.testing.assert_array_equal(losses(evaluated), losses(plain))


@pytest.mark.parametrize("name", ["same_seed", "same_seed_zero3"])
def test_a_fresh_head_is_drawn_from_the_seed(runs: Path, name: str) -> None:
    """The same at any stage, another with another seed; the rest of the model is the checkpoint's."""
    one, other, loaded = (
        weights_of(runs, name),
        weights_of(runs, "other_seed"),
        load_file(runs / "model/model.safetensors"),
    )
    head = one["qa_outputs.weight"]
    assert head.std() > 0.01 and np.abs(head - other["qa_outputs.weight"]).max() > 0.01
    np.testing.assert_array_equal(head, weights_of(runs, "same_seed")["qa_outputs.weight"])
    for weight in loaded:
        np.testing.assert_array_equal(one[weight], loaded[weight], err_msg=weight)
