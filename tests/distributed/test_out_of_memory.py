"""A rank whose host memory is used up ends in one line with what needs less."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.distributed.launching import flags, run

pytestmark = pytest.mark.distributed


def test_a_training_run_without_memory(base_options: dict[str, object], tmp_path: Path) -> None:
    options = {
        **base_options,
        "per_gpu_train_batch_size": 256,
        "deepspeed_config": "zero0",
        "output_dir": tmp_path / "run",
    }
    command = [sys.executable, "-m", "tests.distributed.little_memory_worker", "train", *flags(**options)]
    done = run(command, tmp_path)
    assert done.returncode == 2, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "out of host memory" in line and "--gradient_checkpointing" in line and "Traceback" not in done.stderr
