"""Real processes for tests: one or more ranks, started as users start them, ended as a group when they hang."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tests.paths import REPOSITORY

HANG_SECONDS = 360
"""A launch that takes longer is taken to hang: every process of it is killed and the test fails."""


def environment(**extra: str) -> dict[str, str]:
    """The environment of a launch: this checkout, no network, no GPU, a thread a rank, nothing of an outer launcher."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    settings = {
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    # What lies beside this interpreter (deepspeed, torchrun, ninja) comes first, as in an activated environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return {**kept, **settings, "PATH": path, **extra}


def free_port() -> str:
    """A port that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(command: Sequence[str], folder: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, or kill it and all it started after `HANG_SECONDS` and fail."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=HANG_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(f"hangs: {' '.join(command)}\n{stdout[-3000:]}\n{stderr[-3000:]}") from None
    return subprocess.CompletedProcess(list(command), process.returncode, stdout, stderr)


def alone(*arguments: str) -> list[str]:
    """`python -m qa_deepspeed` without a launcher."""
    return [sys.executable, "-m", "qa_deepspeed", *arguments]


def by_deepspeed(ranks: int, *arguments: str) -> list[str]:
    """Under DeepSpeed's launcher."""
    return [
        "deepspeed",
        "--num_accelerators",
        str(ranks),
        "--master_port",
        free_port(),
        "--module",
        "qa_deepspeed",
        *arguments,
    ]


def by_torchrun(ranks: int, *arguments: str) -> list[str]:
    """Under torchrun."""
    return ["torchrun", "--nproc_per_node", str(ranks), "--master_port", free_port(), "-m", "qa_deepspeed", *arguments]


def run_as_hosts(
    hosts: int, ranks: int, module: Sequence[str], folder: Path, **extra: str
) -> list[subprocess.CompletedProcess[str]]:
    """`python -m` this module and its arguments on `ranks` ranks of each of several hosts, all of them this machine."""
    port = free_port()

    def host(number: int) -> subprocess.CompletedProcess[str]:
        meeting = ["--nnodes", str(hosts), "--node_rank", str(number), "--master_addr", "127.0.0.1"]
        command = ["torchrun", *meeting, "--master_port", port, "--nproc_per_node", str(ranks), "-m", *module]
        return run(command, folder, **extra)

    with ThreadPoolExecutor(hosts) as pool:
        return list(pool.map(host, range(hosts)))


def kill_all(argument: str) -> None:
    """SIGKILL for the launcher and its ranks, which have this argument."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument in path.read_bytes().decode(errors="replace").split("\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


def flags(**options: object) -> list[str]:
    """Keyword arguments as command-line flags."""
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def run_many(
    ranks: int, runs: Mapping[str, Mapping[str, object]], folder: Path, worker: str = "worker", **extra: str
) -> None:
    """Train several runs, one after another, in one launch of `ranks` ranks; each into folder/NAME."""
    listed = folder / f"runs-{ranks}.json"
    listed.write_text(json.dumps(runs))
    command = [
        "torchrun",
        "--nproc_per_node",
        str(ranks),
        "--master_port",
        free_port(),
        "-m",
        f"tests.distributed.{worker}",
        str(listed),
        str(folder),
    ]
    done = run(command, REPOSITORY, **extra)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def logged(run_folder: Path, name: str) -> np.ndarray:
    """A number of every log step of a run, float64 `[log steps]`."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return np.array([line[name] for line in lines if name in line])


def losses(run_folder: Path) -> np.ndarray:
    """The loss of every log step of a run, float64 `[log steps]`."""
    return logged(run_folder, "train/loss")
