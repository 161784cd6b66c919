"""`python -m qa_deepspeed.torchrun`: the exit status of the rank that failed first; agents that meet at an endpoint."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qa_deepspeed.runs.requeue import REQUEUE_STATUS
from qa_deepspeed.torchrun import output_folder
from tests.distributed.launching import environment, flags, free_port, losses, run, run_many
from tests.paths import REPOSITORY

pytestmark = pytest.mark.distributed

TORCHRUN = [sys.executable, "-m", "qa_deepspeed.torchrun"]


def ranks(folder: Path, code: str) -> str:
    """A script for both ranks; `rank` is known there."""
    path = folder / "ranks.py"
    path.write_text(f"import os, sys, time, signal\nrank = int(os.environ['RANK'])\n{code}\n")
    return str(path)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("sys.exit(2 if rank else time.sleep(60))", 2),
        pytest.param("sys.exit(75)", 75, marks=pytest.mark.slow),
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", 137, marks=pytest.mark.slow),
    ],
)
def test_the_status_is_that_of_the_rank_that_failed_first(tmp_path: Path, code: str, status: int) -> None:
    done = run([*TORCHRUN, "--standalone", "--nproc_per_node", "2", ranks(tmp_path, code)], tmp_path)
    assert done.returncode == status, done.stderr[-3000:]


def test_the_last_line_is_the_error_of_the_rank(tmp_path: Path) -> None:
    """Of a user's mistake there is nothing more to say; a rank that was killed has said nothing itself."""
    for code, last in (
        ("if not rank:\n    sys.exit(print('error: x', file=sys.stderr, flush=True) or 2)\ntime.sleep(60)", "error: x"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "exitcode: -9"),
    ):
        done = run([*TORCHRUN, "--standalone", "--nproc_per_node", "2", ranks(tmp_path, code)], tmp_path)
        assert last in done.stderr.splitlines()[-1]


def test_a_torchrun_that_is_stopped_asks_for_a_requeue_where_the_run_did(tmp_path: Path) -> None:
    stop = f"def stop(*_):\n    open({str(tmp_path / 'requeue')!r}, 'w').close()\n    sys.exit(75)\n"
    script = ranks(tmp_path, f"{stop}signal.signal(signal.SIGTERM, stop)\nprint('ready', flush=True)\ntime.sleep(60)")
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "1", script, "--output_dir", str(tmp_path)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == REQUEUE_STATUS


def test_the_output_folder_is_found_among_the_arguments() -> None:
    assert output_folder(["-m", "qa_deepspeed", "train", "--output_dir", "a b"]) == Path("a b")
    assert output_folder(["train", "--output_dir=x=y"]) == Path("x=y")
    assert output_folder(["train", "--output_dir"]) is None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_agents_that_meet_at_an_endpoint_train_as_one(tmp_path: Path, base_options: dict) -> None:
    """By launch/local.sh, each as on a machine of its own."""
    options = {**base_options, "deepspeed_config": "zero2", "do_eval": True}
    run_many(2, {"one-host": options}, tmp_path)
    settings = environment(
        VENV="/nowhere", LAUNCHER="torchrun", NODES="2", GPUS="1", RENDEZVOUS=f"127.0.0.1:{free_port()}"
    )
    command = ["bash", str(REPOSITORY / "launch" / "local.sh"), *flags(**options, output_dir=tmp_path / "run")]
    agents = []
    for number in range(2):
        with open(tmp_path / f"agent{number}.txt", "w") as out:
            agents.append(subprocess.Popen(command, cwd=tmp_path, env=settings, stdout=out, stderr=out))
        time.sleep(1)
    try:
        assert [agent.wait(timeout=300) for agent in agents] == [0, 0], (tmp_path / "agent0.txt").read_text()[-3000:]
    finally:
        for agent in agents:
            agent.kill()
    assert np.array_equal(losses(tmp_path / "run"), losses(tmp_path / "one-host"))
