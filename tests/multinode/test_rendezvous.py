"""launch/local.sh with torchrun on hosts that meet at an endpoint: equal to one host; what happens when one is lost."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed.launching import environment, flags, run_many
from tests.multinode.conftest import Hosts
from tests.multinode.running import TIMEOUT, assert_equal, output, wait_for
from tests.paths import REPOSITORY

pytestmark = [pytest.mark.distributed, pytest.mark.multinode, pytest.mark.slow, pytest.mark.timeout(600)]


@contextmanager
def agents(hosts: Hosts, folder: Path, *arguments: str, **settings: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """local.sh on every host; the output of node1's goes to folder/out.txt. What is left at the end is killed."""
    started = []
    for number in range(1, hosts.count + 1):
        # Namespaces have no host names of their own, by which torchrun identifies itself.
        here = environment(
            VENV="/nowhere",
            LAUNCHER="torchrun",
            GPUS="1",
            RENDEZVOUS="node1:29400",
            GLOO_SOCKET_IFNAME="eth0",
            PET_LOCAL_ADDR=f"node{number}",
            PET_RDZV_CONF=f"is_host={number == 1}",
            **settings,
        )
        command = [*hosts.on(number), "bash", str(REPOSITORY / "launch" / "local.sh"), *arguments]
        with open(folder / ("out.txt" if number == 1 else f"out{number}.txt"), "w") as out:
            started.append(subprocess.Popen(command, cwd=folder, env=here, stdout=out, stderr=subprocess.STDOUT))
    try:
        yield started
    finally:
        for agent in started:
            agent.kill()
            agent.wait()


def test_hosts_that_meet_at_an_endpoint_train_as_one(
    hosts: Hosts, disk: Path, tmp_path: Path, base_options: dict
) -> None:
    options = {**base_options, "deepspeed_config": "zero2", "do_eval": True}
    run_many(2, {"one-host": options}, tmp_path)
    with agents(hosts, tmp_path, *flags(**options, output_dir=disk / "run"), NODES="2") as started:
        assert [agent.wait(timeout=300) for agent in started] == [0, 0], output(tmp_path)[-5000:]
    assert_equal(disk / "run", tmp_path / "one-host")


@pytest.mark.parametrize("loss", ["processes killed", "link cut"])
@pytest.mark.parametrize("hosts", [("shared", 2), ("shared", 3)], indirect=True)
def test_when_a_host_is_lost_the_others_meet_again(
    hosts: Hosts, disk: Path, tmp_path: Path, base_options: dict, loss: str
) -> None:
    """The last host is lost during training; torchrun's other agents resume from the last checkpoint."""
    options = {
        **base_options,
        "deepspeed_config": "zero2",
        "do_eval": True,
        "max_steps": 30,
        "save_steps": 5,
        "global_batch_size": 12,
        "per_gpu_train_batch_size": 2,
        "timeout": TIMEOUT,
    }
    given = flags(**options, output_dir=disk / "run")
    with agents(hosts, tmp_path, *given, NODES=f"1:{hosts.count}", MAX_RESTARTS="2") as started:
        wait_for("checkpoint-5", tmp_path, started[0])
        assert f"{hosts.count} ranks" in output(tmp_path)
        lost = time.monotonic()
        if loss == "link cut":
            hosts.cut(hosts.count)
        else:
            subprocess.run(["kill", "-9", *hosts.processes(hosts.count)], check=False)
        wait_for("or hangs", tmp_path, started[0])
        noticed = time.monotonic() - lost
        wait_for("resuming from", tmp_path, started[0])
        again = time.monotonic() - lost
        assert [agent.wait(timeout=300) for agent in started[:-1]] == [0] * (hosts.count - 1), output(tmp_path)[-5000:]
    done, metrics = time.monotonic() - lost, json.loads((disk / "run" / "metrics.json").read_text())
    print(
        f"{hosts.count} hosts, torchrun, {loss}: noticed after {noticed:.0f} s, resumed after {again:.0f} s, all "
        f"done after {done:.0f} s; exact {metrics['exact']:.1f}, F1 {metrics['f1']:.1f}"
    )
    assert noticed < 3 * TIMEOUT
    steps = [json.loads(line)["step"] for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 30
