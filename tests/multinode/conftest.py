"""Several hosts on one machine, where that is permitted."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.conftest import base_options, model_without_dropout, sample  # noqa: F401

SCRIPT = Path(__file__).with_name("hosts.sh")
MOST_HOSTS = 4


@dataclass(frozen=True)
class Hosts:
    """node1, node2 ... prefix: what the names of their namespaces begin with; disks: "shared" or "separate"."""

    prefix: str
    disks: str
    count: int

    def on(self, number: int) -> list[str]:
        """What goes before a command that runs on that host."""
        return ["ip", "netns", "exec", f"{self.prefix}{number}"]

    def cut(self, number: int) -> None:
        """Cut that host's link."""
        subprocess.run(["ip", "-n", f"{self.prefix}{number}", "link", "set", "eth0", "down"], check=True)

    def processes(self, number: int) -> list[str]:
        """Numbers of the processes on that host."""
        command = ["ip", "netns", "pids", f"{self.prefix}{number}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def script(prefix: str, *arguments: str) -> None:
    """Run hosts.sh for the namespaces of that prefix."""
    subprocess.run(["bash", SCRIPT, *arguments], env={**os.environ, "PREFIX": prefix}, check=True)


def missing() -> str | None:
    """Why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    for name, package in (("ip", "iproute2"), ("sshd", "openssh-server"), ("ssh", "openssh-client"), ("pdsh", "pdsh")):
        if shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin") is None:
            return f"{name} is not installed (package {package})"
    probe = f"qa{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return None if made.returncode == 0 else f"network namespaces are not permitted: {made.stderr.strip()}"


def take_away_leftovers() -> None:
    """Hosts of tests that were killed: their names say whose they were."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for process in set(re.findall(r"^qa(\d+)-node", listed, re.MULTILINE)):
        if not Path(f"/proc/{process}").exists():
            script(f"qa{process}-node", "down", str(MOST_HOSTS))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The folder that runs write into."""
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.fixture(params=[("shared", 2)], ids=lambda param: f"{param[1]}-hosts-{param[0]}")
def hosts(request: pytest.FixtureRequest, tmp_path: Path, disk: Path) -> Iterator[Hosts]:
    """Hosts which share the folder `disk` or have one each; all else they share."""
    why = missing()
    if why:
        pytest.skip(f"hosts cannot be made here: {why}")
    take_away_leftovers()
    made = Hosts(f"qa{os.getpid()}-node", *request.param)
    own = [str(disk)] if made.disks == "separate" else []
    try:
        script(made.prefix, "up", str(tmp_path / "ssh"), str(made.count), *own)
        yield made
    finally:
        script(made.prefix, "down", str(made.count))
