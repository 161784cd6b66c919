"""Two hosts on one machine, where that is permitted."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dist.conftest import base_options, model_without_dropout, sample  # noqa: F401

HOSTS = Path(__file__).with_name("hosts.sh")
COUNT = 2


def missing() -> str | None:
    """Why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    for name, package in (("ip", "iproute2"), ("sshd", "openssh-server"), ("ssh", "openssh-client"), ("pdsh", "pdsh")):
        if shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin") is None:
            return f"{name} is not installed (package {package})"
    made = subprocess.run(["ip", "netns", "add", "qa_probe"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", "qa_probe"], capture_output=True)
    return None if made.returncode == 0 else f"network namespaces are not permitted: {made.stderr.strip()}"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The folder that runs write into."""
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.fixture(params=["shared disk"])
def hosts(request: pytest.FixtureRequest, tmp_path: Path, disk: Path) -> Iterator[str]:
    """node1 and node2; says whether they share the folder `disk`."""
    why = missing()
    if why:
        pytest.skip(f"hosts cannot be made here: {why}")
    subprocess.run([HOSTS, "down", str(COUNT)], check=True)
    own = [str(disk)] if request.param == "separate disks" else []
    try:
        subprocess.run([HOSTS, "up", str(tmp_path / "ssh"), str(COUNT), *own], check=True)
        yield request.param
    finally:
        subprocess.run([HOSTS, "down", str(COUNT)], check=True)
