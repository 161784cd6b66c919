"""The job on two to four hosts by launch/multinode.sh: equal to one host, and what happens when one is lost.

    python -m pytest -s tests/multinode

needs root, and the Debian packages iproute2, openssh-server and pdsh (`tests/multinode/hosts.sh install`). The first
test belongs to the default run of the tests, the others take minutes.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qa_deepspeed.config.run_options import RunOptions
from tests.distributed.launching import environment, flags, run_many
from tests.multinode.conftest import Hosts
from tests.multinode.running import TIMEOUT, assert_equal, output, wait_for
from tests.paths import REPOSITORY

pytestmark = [pytest.mark.distributed, pytest.mark.multinode, pytest.mark.timeout(600)]
SHARED, SEPARATE = ("shared", 2), ("separate", 2)


def on_node1(hosts: Hosts, folder: Path, *arguments: str, **settings: str) -> subprocess.Popen[str]:
    """Start launch/multinode.sh on node1; its output goes to folder/out.txt."""
    settings = {"MASTER_ADDR": "10.77.0.1", **settings}
    here = environment(VENV="/nowhere", HOSTFILE=str(folder / "hosts"), **settings)
    (folder / "hosts").write_text("".join(f"node{number + 1} slots=1\n" for number in range(hosts.count)))
    sent = ("PATH", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "DS_ACCELERATOR")
    lines = [f"{name}={here[name]}" for name in sent] + ["GLOO_SOCKET_IFNAME=eth0"]
    (folder / ".deepspeed_env").write_text("\n".join(lines) + "\n")
    command = [*hosts.on(1), "bash", str(REPOSITORY / "launch" / "multinode.sh"), *arguments]
    with open(folder / "out.txt", "w") as out:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**here, "GLOO_SOCKET_IFNAME": "eth0"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.mark.parametrize("hosts", [SEPARATE], indirect=True)
def test_two_hosts_train_as_one(hosts: Hosts, disk: Path, tmp_path: Path, base_options: dict) -> None:
    """Equal to two ranks of one host; the hosts have a disk each, for output and features."""
    options = {**base_options, "deepspeed_config": "zero2", "do_eval": True, "max_steps": 4}
    run_many(2, {"one-host": options}, tmp_path)
    process = on_node1(hosts, tmp_path, *flags(**{**options, "cache_dir": disk / "cache"}, output_dir=disk / "run"))
    assert process.wait(timeout=300) == 0, output(tmp_path)[-5000:]
    assert_equal(disk / "run", tmp_path / "one-host")


@pytest.fixture(scope="module")
def whole_job(base_options: dict) -> dict:
    """Training, checkpoints and evaluation."""
    return {**base_options, "do_eval": True, "save_steps": 6}


@pytest.fixture(scope="module")
def references(whole_job: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job by two ranks of one host, under each config in a folder of its name."""
    folder = tmp_path_factory.mktemp("references")
    run_many(2, {config: {**whole_job, "deepspeed_config": config} for config in ("zero0", "zero2", "zero3")}, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["pdsh", "ssh", "openmpi"])
@pytest.mark.parametrize("config", ["zero2", "zero3"])
@pytest.mark.parametrize("hosts", [SHARED, SEPARATE], indirect=True)
def test_every_way_to_train_on_two_hosts(
    hosts: Hosts, disk: Path, tmp_path: Path, whole_job: dict, references: Path, config: str, launcher: str
) -> None:
    settings = {"LAUNCHER": launcher}
    if launcher == "openmpi":
        if shutil.which("mpirun") is None:
            pytest.skip("mpirun is not installed (package openmpi-bin)")
        settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    given = flags(**{**whole_job, "cache_dir": disk / "cache"}, deepspeed_config=config, output_dir=disk / "run")
    process = on_node1(hosts, tmp_path, *given, **settings)
    assert process.wait(timeout=300) == 0, output(tmp_path)[-5000:]
    assert_equal(disk / "run", references / config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hosts", "config"), [(("shared", 3), "zero2"), (("separate", 4), "zero3")], indirect=["hosts"]
)
def test_more_hosts_train_as_one(hosts: Hosts, disk: Path, tmp_path: Path, whole_job: dict, config: str) -> None:
    """Equal to as many ranks of one host."""
    options = {**whole_job, "deepspeed_config": config, "per_gpu_train_batch_size": 4}
    run_many(hosts.count, {"one-host": options}, tmp_path)
    process = on_node1(hosts, tmp_path, *flags(**{**options, "cache_dir": disk / "cache"}, output_dir=disk / "run"))
    assert process.wait(timeout=400) == 0, output(tmp_path)[-5000:]
    assert_equal(disk / "run", tmp_path / "one-host")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero0", "zero2", "zero3"])
@pytest.mark.parametrize("hosts", [SEPARATE], indirect=True)
def test_a_run_resumes_from_checkpoints_on_separate_disks(
    hosts: Hosts, disk: Path, tmp_path: Path, whole_job: dict, references: Path, config: str
) -> None:
    given = flags(**whole_job, deepspeed_config=config, output_dir=disk / "run")
    process = on_node1(hosts, tmp_path, *given, "--max_time", "1s")
    assert process.wait(timeout=300) == 75, output(tmp_path)[-5000:]
    process = on_node1(hosts, tmp_path, *given)
    assert process.wait(timeout=300) == 0, output(tmp_path)[-5000:]
    assert "resuming from" in output(tmp_path)
    assert_equal(disk / "run", references / config)


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [SEPARATE], indirect=True)
def test_a_host_that_is_lost_with_its_disk_takes_its_shards_along(
    hosts: Hosts, disk: Path, tmp_path: Path, base_options: dict
) -> None:
    """At ZeRO-2 node1 alone cannot resume, and says so in one line, once."""
    options = {
        **base_options,
        "deepspeed_config": "zero2",
        "max_steps": 30,
        "save_steps": 5,
        "timeout": TIMEOUT,
        "global_batch_size": 16,
        "per_gpu_train_batch_size": 4,
    }
    process = on_node1(hosts, tmp_path, "--max_restarts", "2", *flags(**options, output_dir=disk / "run"))
    wait_for("checkpoint-5", tmp_path, process)
    subprocess.run(["kill", "-9", *hosts.processes(2)], check=False)
    assert process.wait(timeout=300) == 2, output(tmp_path)[-5000:]
    assert "has no shards of rank 1 on this disk" in output(tmp_path) and "restart 2" not in output(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero0", "zero2"])
@pytest.mark.parametrize("loss", ["processes killed", "link cut"])
@pytest.mark.parametrize("hosts", [SHARED, ("shared", 3)], indirect=True)
def test_a_lost_host_is_noticed_and_the_rest_continues(
    hosts: Hosts, disk: Path, tmp_path: Path, base_options: dict, loss: str, config: str
) -> None:
    """The last host is lost during training; the others resume from the last checkpoint with the same global batch."""
    last = hosts.count
    options = {
        **base_options,
        "deepspeed_config": config,
        "do_eval": True,
        "max_steps": 30,
        "save_steps": 5,
        "global_batch_size": 12,
        "per_gpu_train_batch_size": 2,
        "timeout": TIMEOUT,
    }
    process = on_node1(hosts, tmp_path, "--max_restarts", "1", *flags(**options, output_dir=disk / "run"))
    wait_for("checkpoint-5", tmp_path, process)
    lost = time.monotonic()
    if loss == "link cut":
        hosts.cut(last)
    else:
        subprocess.run(["kill", "-9", *hosts.processes(last)], check=False)
    wait_for("restart 1 of 1", tmp_path, process)
    noticed = time.monotonic() - lost
    assert process.wait(timeout=300) == 0, output(tmp_path)[-5000:]
    text = output(tmp_path)
    assert f"node{last} does not answer and is left out" in text
    assert "resuming from" in text.split("restart 1 of 1")[1]
    metrics = json.loads((disk / "run" / "metrics.json").read_text())
    print(
        f"{last} hosts, {config}, {loss}: noticed and ended after {noticed:.0f} s, all done after "
        f"{time.monotonic() - lost:.0f} s; exact {metrics['exact']:.1f}, F1 {metrics['f1']:.1f}"
    )
    assert noticed < 3 * TIMEOUT + 15
    steps = [json.loads(line)["step"] for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 30


@pytest.mark.slow
def test_check_looks_at_real_hosts(hosts: Hosts, tmp_path: Path, base_options: dict) -> None:
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    known = {name: value for name, value in base_options.items() if name in RunOptions.__dataclass_fields__}
    given = flags(**known, output_dir=tmp_path / "run", hostfile=tmp_path / "hosts", master_port=29617)
    command = [*hosts.on(1), sys.executable, "-m", "qa_deepspeed", "check", *given]
    settings = {**environment(), "PWD": str(REPOSITORY), "HOME": str(tmp_path)}
    good = subprocess.run(command, cwd=REPOSITORY, env=settings, capture_output=True, text=True)
    assert good.returncode == 0 and "2 answer, with the versions of this one" in good.stdout, good.stdout
    hosts.cut(2)
    bad = subprocess.run(command, cwd=REPOSITORY, env=settings, capture_output=True, text=True)
    assert bad.returncode == 1 and "node2 cannot be reached" in bad.stdout, bad.stdout
