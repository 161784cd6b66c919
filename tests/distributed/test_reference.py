"""Losses, gradient norms, learning rates and weights of a loop written without this package (`reference`).

At one and two ranks and every ZeRO stage, with weight decay, clipping that is active, warm-up, accumulation, a partial
last batch and two epochs; and, at two ranks, resumed after the first epoch with other hyperparameters.

Adam's epsilon is not too small: parameters without a gradient (the bias of the head, which shifts all logits alike, and
those of keys) would move by rounding noise.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.facts import model_facts
from qa_deepspeed.training.features import load_features
from tests.distributed import reference
from tests.distributed.launching import logged, run_many

pytestmark = pytest.mark.distributed

ROWS, BATCH = 35, 8
STEPS_PER_EPOCH = 5
"""The fifth step has 3 rows, fewer than the 4 micro-batches of two ranks: one of them is a dummy row."""

SETTINGS = reference.Settings(
    batch=BATCH,
    epochs=2,
    seed=42,
    warmup_steps=3,
    adam_epsilon=1e-5,
    learning_rate=1e-3,
    weight_decay=0.1,
    max_grad_norm=0.5,
    group_by_length=False,
)
CHANGES = {"learning_rate": 5e-4, "weight_decay": 0.02, "max_grad_norm": 0.05}
"""Hyperparameters of the resumed runs, in the second epoch."""

PADDED_STAGE = 1
"""The ZeRO stage whose runs get padded rows in steps of similar length; the others get packed rows in random steps."""

CASES = [(ranks, stage) for ranks in (1, 2) for stage in range(4)]
LOSS, NORM, RATE, WEIGHTS = 2e-6, 1e-5, 1e-12, 3e-4
"""Largest relative differences; that of a weight is relative to the way the largest change of any weight went."""


def options_of(ranks: int, stage: int, base: dict[str, object], folder: Path) -> dict[str, dict[str, object]]:
    """A run; at two ranks with a checkpoint after the first epoch, where another starts with other hyperparameters."""
    settings = dataclasses.asdict(SETTINGS)
    options = {
        **base,
        **{name: settings[name] for name in settings if name not in ("batch", "epochs", "group_by_length")},
        "batch_layout": "padded" if stage == PADDED_STAGE else "packed",
        "max_train_examples": ROWS,
        "num_train_epochs": SETTINGS.epochs,
        "max_steps": -1,
        "deepspeed_config": f"zero{stage}",
        "per_gpu_train_batch_size": BATCH // 2 // ranks,
        "gradient_accumulation_steps": 2,
        "save_steps": STEPS_PER_EPOCH,
    }
    name = name_of(ranks, stage)
    checkpoint = folder / name / f"checkpoint-{STEPS_PER_EPOCH}"
    resumed = {"resume_from_checkpoint": str(checkpoint), "resume_with_changes": ",".join(CHANGES), "save_steps": 0}
    both = {name: options, f"{name}_resumed": {**options, **CHANGES, **resumed}}
    return both if ranks == 2 else {name: {**options, "save_steps": 0}}


def name_of(ranks: int, stage: int) -> str:
    """Name of a run."""
    return f"ranks{ranks}_zero{stage}"


@pytest.fixture(scope="module")
def runs(base_options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every run in a folder of its name."""
    folder: Path = tmp_path_factory.mktemp("reference")
    for ranks in (1, 2):
        of_stages = [options_of(ranks, stage, base_options, folder) for stage in range(4)]
        run_many(ranks, {name: options for pair in of_stages for name, options in pair.items()}, folder)
    return folder


@pytest.fixture(scope="module")
def rows(base_options: dict[str, object]) -> list[reference.Row]:
    """The training rows."""
    given = {**base_options, "max_train_examples": ROWS, "output_dir": "unused"}
    options = RunOptions(**given, given=frozenset(given))  # type: ignore[arg-type]
    return reference.rows_of(load_features(options, "train", model_facts(options)))


@pytest.fixture(scope="module")
def expected(model_without_dropout: Path, rows: list[reference.Row]) -> dict[bool, reference.Trained]:
    """The reference's runs: with steps of similar length or not."""
    return {
        grouped: reference.train(model_without_dropout, rows, dataclasses.replace(SETTINGS, group_by_length=grouped))
        for grouped in (False, True)
    }


@pytest.fixture(scope="module")
def expected_resumed(model_without_dropout: Path, rows: list[reference.Row]) -> dict[bool, reference.Trained]:
    """The reference's runs, with other hyperparameters in the second epoch."""
    found = {}
    for grouped in (False, True):
        first = dataclasses.replace(SETTINGS, group_by_length=grouped)
        second = dataclasses.replace(first, **CHANGES)
        found[grouped] = reference.train(model_without_dropout, rows, first, partial(_of_epoch, first, second))
    return found


def _of_epoch(first: reference.Settings, second: reference.Settings, epoch: int) -> reference.Settings:
    return second if epoch else first


def differences(run: Path, expected: reference.Trained, first_step: int = 0) -> dict[str, float]:
    """The largest relative difference of each quantity, in the steps from `first_step` on."""
    found = {}
    for name, key in (("losses", "train/loss"), ("norms", "train/grad_norm"), ("rates", "train/learning_rate")):
        values, wanted = logged(run, key), np.array(getattr(expected, name)[first_step:])
        assert values.shape == wanted.shape, (name, values.shape)
        found[name] = float(np.max(np.abs(values - wanted) / np.maximum(np.abs(wanted), 1e-30)))
    weights = load_file(run / "model.safetensors")
    assert weights.keys() == expected.weights.keys()
    way = max(np.abs(value - expected.before[name]).max() for name, value in expected.weights.items())
    found["weights"] = float(max(np.abs(weights[name] - value).max() for name, value in expected.weights.items()) / way)
    return found


def test_the_settings_are_put_to_use(rows: list[reference.Row], expected: dict[bool, reference.Trained]) -> None:
    """Clipping is active in most steps, the last batch is partial, rows with and without an answer are there."""
    for trained in expected.values():
        assert len(trained.losses) == 2 * STEPS_PER_EPOCH and 0 < len(rows) % BATCH < 4
        assert sum(norm > SETTINGS.max_grad_norm for norm in trained.norms) > STEPS_PER_EPOCH
    assert 0 < sum(row.start == 0 for row in rows) < len(rows)
    assert len({len(row.input_ids) for row in rows}) > 10


@pytest.mark.parametrize(("ranks", "stage"), CASES)
def test_a_run_is_the_references(runs: Path, expected: dict[bool, reference.Trained], ranks: int, stage: int) -> None:
    found = differences(runs / name_of(ranks, stage), expected[stage == PADDED_STAGE])
    print(f"ranks {ranks} stage {stage}", found)
    assert found["losses"] < LOSS and found["norms"] < NORM and found["rates"] < RATE and found["weights"] < WEIGHTS


@pytest.mark.parametrize("stage", range(4))
def test_a_resumed_run_follows_changed_hyperparameters(
    runs: Path, expected_resumed: dict[bool, reference.Trained], stage: int
) -> None:
    found = differences(runs / f"{name_of(2, stage)}_resumed", expected_resumed[stage == PADDED_STAGE], STEPS_PER_EPOCH)
    print(f"ranks 2 stage {stage} resumed", found)
    assert found["losses"] < LOSS and found["norms"] < NORM and found["rates"] < RATE and found["weights"] < WEIGHTS
