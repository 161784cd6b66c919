"""Checkpoints of two ranks: damaged files, full disks, clocks, signals, other stages and ranks, two runs at once."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from qa_deepspeed.engine.checkpoints.checkpoint_files import checkpoints, step_of, verify_checkpoint
from tests.distributed.launching import alone, by_deepspeed, by_torchrun, environment, flags, free_port, run
from tests.paths import REPOSITORY

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def options(base_options: dict[str, object]) -> dict[str, object]:
    """A run of 6 steps, a checkpoint every second; epsilon keeps Adam from making updates out of rounding."""
    return {
        **base_options,
        "max_steps": 6,
        "save_steps": 2,
        "per_gpu_train_batch_size": 4,
        "deepspeed_config": "zero2",
        "adam_epsilon": 1e-3,
    }


def play(ranks: int, folder: Path, *scenes: str) -> None:
    """Play scenes of checkpoint_scenes.py (which says what is checked) in one launch; all of them if none is named."""
    command = ["torchrun", "--nproc_per_node", str(ranks), "--master_port", free_port()]
    command += ["-m", "tests.distributed.checkpoint_scenes", str(folder / "options.json"), str(folder), *scenes]
    done = run(command, REPOSITORY)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def played(options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two ranks have played every scene."""
    folder: Path = tmp_path_factory.mktemp("scenes")
    (folder / "options.json").write_text(json.dumps(options))
    play(2, folder)
    return folder


def test_every_scene_comes_out_on_two_ranks(played: Path) -> None:
    """Each scene asserts for itself; what they leave is there."""
    assert list(played.rglob("checkpoint-*"))


@pytest.mark.slow
def test_another_number_of_ranks_resumes(played: Path) -> None:
    """2 -> 1 -> 2 ranks within an epoch, at ZeRO 1, 2 and 3."""
    play(1, played, "one_rank_resumes_and_stops")
    play(2, played, "two_ranks_finish_what_one_resumed")


@pytest.mark.slow
def test_a_disk_that_refuses_leaves_the_run_going(options: dict[str, object], tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: it needs no rights. Both ranks come through."""
    limited = 'ulimit -f 300; exec "$0" "$@"'  # 300 KiB: the log fits, shards and model do not
    command = by_torchrun(2, "train", *flags(**{**options, "output_dir": tmp_path / "run", "save_retry": 1}))
    done = run(["bash", "-c", limited, *command], tmp_path)
    for step in (2, 4, 6):
        assert f"checkpoint-{step} was NOT saved; training continues" in done.stdout
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "number"),
    [
        (by_deepspeed, signal.SIGTERM),
        (by_deepspeed, signal.SIGINT),
        (by_deepspeed, signal.SIGUSR1),
        (by_torchrun, signal.SIGTERM),
        (by_torchrun, signal.SIGINT),
    ],
)
def test_a_signal_to_the_launcher_ends_the_run_in_good_order(
    options: dict[str, object], tmp_path: Path, launch: Callable[..., list[str]], number: int
) -> None:
    """torchrun hands its signal on; deepspeed does not: it gets it with all that it has started, as by Ctrl-C."""
    given = {**options, "output_dir": tmp_path / "run", "max_steps": 100000, "save_steps": 0}
    command = launch(2, "train", *flags(**given))
    with subprocess.Popen(
        command,
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as launcher:
        assert launcher.stdout is not None
        assert any("step 3/" in line for line in launcher.stdout)
        (os.kill if launch is by_torchrun else os.killpg)(launcher.pid, number)
        printed, errors = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    reason = json.loads((tmp_path / "run/requeue").read_text())["reason"]
    (checkpoint,) = checkpoints(tmp_path / "run")
    line = f"preempted by {reason} after step {step_of(checkpoint)} of 100000"
    assert line in printed, printed[-2000:] + errors[-2000:]
    assert verify_checkpoint(checkpoint) is None


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_with_the_place_named(options: dict[str, object], tmp_path: Path) -> None:
    """Rank 1 is stopped in mid-training: rank 0 gives it up after the timeout and says where it waited."""
    command = by_torchrun(
        2,
        "train",
        *flags(**{**options, "output_dir": tmp_path / "run", "max_steps": 100000, "save_steps": 0, "timeout": 15}),
    )
    with subprocess.Popen(
        command, env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None and launcher.stderr is not None
        assert any("step 3/" in line for line in launcher.stdout)
        ranks = psutil.Process(launcher.pid).children()
        next(one for one in ranks if one.environ()["RANK"] == "1").suspend()
        began = time.monotonic()
        errors = launcher.communicate(timeout=120)[1]
    assert launcher.returncode != 0 and time.monotonic() - began < 90
    assert "qa-deepspeed: error: rank 0 waited in step" in errors, errors[-3000:]
