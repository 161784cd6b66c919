"""Checkpoints of two ranks under attack: damaged files, full disks, clocks, two runs on one folder."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.dist.launching import alone, by_torchrun, environment, flags, free_port, run
from tests.paths import REPOSITORY

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def options(base_options: dict[str, object]) -> dict[str, object]:
    """A run of 6 steps, a checkpoint every second, whatever the number of ranks."""
    return {**base_options, "max_steps": 6, "save_steps": 2, "global_batch_size": 8, "per_gpu_train_batch_size": 4,
            "deepspeed_config": "zero2"}  # fmt: skip


def test_scenes_of_two_ranks(options: dict[str, object], tmp_path: Path) -> None:
    """What is played, and checked on every rank, stands in checkpoint_scenes.py."""
    (tmp_path / "options.json").write_text(json.dumps(options))
    command = ["torchrun", "--nproc_per_node", "2", "--master_port", free_port(), "-m", "tests.dist.checkpoint_scenes"]
    done = run([*command, str(tmp_path / "options.json"), str(tmp_path)], REPOSITORY)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_disk_that_refuses_leaves_the_run_going(options: dict[str, object], tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: it needs no rights. Both ranks come through."""
    limited = "ulimit -f 300; exec \"$0\" \"$@\""  # 300 KiB: the log fits, shards and model do not
    command = by_torchrun(2, "train", *flags(**{**options, "output_dir": tmp_path / "run"}))
    done = run(["bash", "-c", limited, *command], tmp_path)
    for step in (2, 4, 6):
        assert f"checkpoint-{step} was NOT saved; training goes on" in done.stdout
    assert "cannot save a checkpoint: " in done.stdout
    assert "step 6/6" in done.stdout
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
def test_a_second_run_on_one_folder_is_refused(options: dict[str, object], tmp_path: Path) -> None:
    command = alone("train", *flags(**{**options, "output_dir": tmp_path / "run", "max_steps": 100000}))
    with subprocess.Popen(command, env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            assert any("step 1/" in line for line in first.stdout)
            second = run(command, tmp_path)
        finally:
            first.kill()
    assert second.returncode == 2 and f"process {first.pid} on " in second.stderr
