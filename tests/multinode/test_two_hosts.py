"""The job on two hosts by launch/multinode.sh: equal to one host, and what happens when a host or its link is lost.

    python -m pytest -s tests/multinode

needs root, and the Debian packages iproute2, openssh-server and pdsh.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qa_deepspeed.config import RunOptions
from tests.dist.launching import environment, flags, losses, run_many
from tests.paths import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.multinode, pytest.mark.timeout(600)]
TIMEOUT = 20
"""Seconds after which a collective is given up, in the runs that lose a host."""


def on_node1(folder: Path, *arguments: str, **settings: str) -> subprocess.Popen[str]:
    """Start launch/multinode.sh on node1; its output goes to folder/out.txt."""
    here = environment(VENV="/nowhere", HOSTFILE=str(folder / "hosts"), **settings)
    (folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    sent = ("PATH", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "DS_ACCELERATOR")
    lines = [f"{name}={here[name]}" for name in sent] + ["GLOO_SOCKET_IFNAME=eth0"]
    (folder / ".deepspeed_env").write_text("\n".join(lines) + "\n")
    command = ["ip", "netns", "exec", "node1", "bash", str(REPOSITORY / "launch" / "multinode.sh"), *arguments]
    with open(folder / "out.txt", "w") as out:
        return subprocess.Popen(
            command, cwd=folder, env={**here, "GLOO_SOCKET_IFNAME": "eth0"}, stdin=subprocess.DEVNULL, stdout=out,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


def output(folder: Path) -> str:
    return (folder / "out.txt").read_text()


def wait_for(text: str, folder: Path, process: subprocess.Popen[str], seconds: float = 200) -> None:
    """Until the output has `text`."""
    end = time.monotonic() + seconds
    while text not in output(folder):
        assert process.poll() is None and time.monotonic() < end, output(folder)[-5000:]
        time.sleep(0.1)


@pytest.mark.parametrize("launcher", ["pdsh", "ssh"])
@pytest.mark.parametrize("config", ["zero2", "zero3"])
@pytest.mark.parametrize("hosts", ["shared disk", "separate disks"], indirect=True)
def test_two_hosts_train_as_one(
    hosts: str, disk: Path, tmp_path: Path, base_options: dict, config: str, launcher: str  # noqa: F811
) -> None:
    if launcher == "ssh" and (config, hosts) != ("zero2", "shared disk"):
        pytest.skip("the launcher is tried once")
    options = {**base_options, "deepspeed_config": config, "do_eval": True, "save_steps": 6}
    run_many(2, {"one-host": options}, tmp_path)
    process = on_node1(tmp_path, *flags(**options, output_dir=disk / "run"), LAUNCHER=launcher, MASTER_ADDR="10.77.0.1")
    assert process.wait(timeout=300) == 0, output(tmp_path)[-5000:]
    assert np.array_equal(losses(disk / "run"), losses(tmp_path / "one-host"))
    names = ("metrics.json", "predictions.json")
    assert all((disk / "run" / name).read_bytes() == (tmp_path / "one-host" / name).read_bytes() for name in names)


@pytest.mark.parametrize("loss", ["processes killed", "link cut"])
def test_a_lost_host_is_noticed_and_the_rest_goes_on(
    hosts: str, disk: Path, tmp_path: Path, base_options: dict, loss: str  # noqa: F811
) -> None:
    """node2 goes away in mid-training; node1 alone goes on from the last checkpoint with the same global batch."""
    options = {**base_options, "deepspeed_config": "zero0", "do_eval": True, "max_steps": 30, "save_steps": 5,
               "global_batch_size": 16, "per_gpu_train_batch_size": 4, "timeout": TIMEOUT}  # fmt: skip
    process = on_node1(tmp_path, "--max_restarts", "1", *flags(**options, output_dir=disk / "run"),
                       MASTER_ADDR="10.77.0.1")  # fmt: skip
    wait_for("checkpoint-5", tmp_path, process)
    lost = time.monotonic()
    if loss == "link cut":
        subprocess.run(["ip", "-n", "node2", "link", "set", "eth0", "down"], check=True)
    else:
        found = subprocess.run(["ip", "netns", "pids", "node2"], capture_output=True, text=True, check=True)
        subprocess.run(["kill", "-9", *found.stdout.split()], check=False)
    wait_for("restart 1 of 1", tmp_path, process)
    noticed = time.monotonic() - lost
    assert process.wait(timeout=300) == 0, output(tmp_path)[-5000:]
    text = output(tmp_path)
    assert "node2 does not answer and is left out" in text
    assert "going on from" in text.split("restart 1 of 1")[1]
    print(f"{loss}: noticed and ended after {noticed:.0f} s, all done after {time.monotonic() - lost:.0f} s; "
          + json.dumps(json.loads((disk / "run" / "metrics.json").read_text()))[:200])  # fmt: skip
    assert noticed < 3 * TIMEOUT + 15
    steps = [json.loads(line)["step"] for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 30


def test_check_looks_at_real_hosts(hosts: str, tmp_path: Path, base_options: dict) -> None:  # noqa: F811
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    known = {name: value for name, value in base_options.items() if name in RunOptions.__dataclass_fields__}
    given = flags(**known, output_dir=tmp_path / "run", hostfile=tmp_path / "hosts", master_port=29617)
    command = ["ip", "netns", "exec", "node1", sys.executable, "-m", "qa_deepspeed", "check", *given]
    settings = {**environment(), "PWD": str(REPOSITORY), "HOME": str(tmp_path)}
    good = subprocess.run(command, cwd=REPOSITORY, env=settings, capture_output=True, text=True)
    assert good.returncode == 0 and "2 answer, with the versions of this one" in good.stdout, good.stdout
    subprocess.run(["ip", "-n", "node2", "link", "set", "eth0", "down"], check=True)
    bad = subprocess.run(command, cwd=REPOSITORY, env=settings, capture_output=True, text=True)
    assert bad.returncode == 1 and "node2 cannot be reached" in bad.stdout, bad.stdout
