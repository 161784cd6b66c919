"""launch/slurm.sbatch with scripts in place of srun and scontrol that set Slurm's variables: two tasks are two ranks.

The commands alone, requeueing and mistakes: tests/unit/launch/test_scripts.py.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.launching import environment, flags, free_port, losses, run, run_many
from tests.paths import REPOSITORY

SRUN = """#!/usr/bin/env bash
shift  # --kill-on-bad-exit=1
export SLURM_NTASKS=2 SLURM_STEP_TASKS_PER_NODE="1(x2)" SLURM_LOCALID=0
for number in 0 1; do SLURM_PROCID=$number "$@" & done
wait -n && wait -n
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_two_tasks_on_two_nodes_train_as_one(tmp_path: Path, base_options: dict) -> None:
    options = {**base_options, "deepspeed_config": "zero2", "do_eval": True}
    run_many(2, {"one-host": options}, tmp_path)
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    command = ["bash", str(REPOSITORY / "launch" / "slurm.sbatch"), *flags(**options, output_dir=tmp_path / "run")]
    done = run(
        command,
        tmp_path,
        PATH=f"{tmp_path}{os.pathsep}{environment()['PATH']}",
        VENV="/nowhere",
        PORT=free_port(),
        SLURM_JOB_ID="1",
        SLURM_JOB_NODELIST="two",
        SLURM_SUBMIT_DIR=str(REPOSITORY),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert np.array_equal(losses(tmp_path / "run"), losses(tmp_path / "one-host"))
    metrics = [(tmp_path / name / "metrics.json").read_bytes() for name in ("run", "one-host")]
    assert metrics[0] == metrics[1]
