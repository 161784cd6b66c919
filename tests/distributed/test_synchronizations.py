"""Between log steps the host does not wait for the device: no `.item()`, no `nonzero`, in our code or DeepSpeed's.

On a CPU nothing waits, but the operators are the same. Dropout is off: its kernels for CPUs draw their seeds as
numbers. ZeRO-0 in half precision is left out: DeepSpeed's optimizer there reads every parameter; `auto` takes ZeRO-1.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launching import run_many

pytestmark = pytest.mark.distributed

LOGS = 4
RUNS: dict[str, dict[str, object]] = {
    "zero0": {"deepspeed_config": "zero0"},
    "zero1_bf16": {"deepspeed_config": "zero1", "bf16": True},
    "zero2_accumulated": {"deepspeed_config": "zero2", "gradient_accumulation_steps": 2},
    "zero2_bf16": {"deepspeed_config": "zero2", "bf16": True},
}


@pytest.fixture(scope="module")
def waits(base_options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """For each run the waiting operators of each step. A step's list begins after the step before has been counted, so
    that what a log line reads is in the list of the next step."""
    folder: Path = tmp_path_factory.mktemp("waits")
    options = {**base_options, "logging_steps": LOGS, "max_steps": 2 * LOGS + 2, "per_gpu_train_batch_size": 4}
    run_many(1, {name: {**options, **extra} for name, extra in RUNS.items()}, folder, "synchronizing_worker")
    return {name: json.loads((folder / f"{name}.waits.json").read_text()) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_steps_between_log_lines_do_not_wait(waits: dict[str, list[list[str]]], name: str) -> None:
    """Step `LOGS` (from 1) reads its norm, the step after it holds what the log line read."""
    quiet = [step for number, step in enumerate(waits[name][:-1], 1) if number % LOGS > 1 or number == 1]
    assert len(quiet) > LOGS and quiet == [[]] * len(quiet)


@pytest.mark.parametrize("name", RUNS)
def test_log_lines_do(waits: dict[str, list[list[str]]], name: str) -> None:
    """The counter counts."""
    assert waits[name][LOGS], "a log line reads loss and guard"
