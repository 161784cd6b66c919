"""The hosts of a run: the hostfile, whether they can be reached, whether they have the same software.

`python -m qa_deepspeed.utils.hosts` prints the versions that must agree on all hosts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qa_deepspeed.utils.errors import UserError

CONNECT_SECONDS = 5
PROBE_SECONDS = 30

ALWAYS_SENT = ("MLFLOW", "PYTHON", "MV2", "UCX")
"""Prefixes of the variables that DeepSpeed's launcher passes to the hosts from its environment (its `EXPORT_ENVS`)."""


HOST_NAME = re.compile(r"[A-Za-z0-9._:@%][A-Za-z0-9._:@%-]*")
"""Names and addresses, with a user before `@`; a name that begins with `-` would be an option of ssh."""


@dataclass(frozen=True)
class Host:
    """One line of a hostfile: a name that ssh knows, and how many ranks run there."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a DeepSpeed hostfile: lines `NAME slots=NUMBER`, comments after `#`.

    Raises:
        UserError: no such file, a line that is not of that form, a host twice, no host.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"hostfile {path} cannot be read ({reason}); lines look like 'node1 slots=8'") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)\s*(?:#.*)?", text)
        if match is None or int(match[2]) == 0:
            raise UserError(f"hostfile {path}, line {number}: '{text}' is not like 'node1 slots=8'; correct it")
        if not HOST_NAME.fullmatch(match[1]):
            raise UserError(f"hostfile {path}, line {number}: '{match[1]}' is not the name of a host; correct it")
        if match[1] in hosts:
            raise UserError(f"hostfile {path}, line {number}: {match[1]} is listed twice; give each host one line")
        hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts:
        raise UserError(f"hostfile {path} names no host; lines look like 'node1 slots=8'")
    return list(hosts.values())


def faults(hosts: list[Host], ssh_port: int | None) -> list[str]:
    """Faults of the hosts, one line each, found in parallel by ssh; empty if all can run this program."""
    here = versions()
    with ThreadPoolExecutor(len(hosts)) as pool:
        found = pool.map(lambda host: _faults_of(host, ssh_port, here), hosts)
    return [fault for of_host in found for fault in of_host]


def _faults_of(host: Host, ssh_port: int | None, here: dict[str, str]) -> list[str]:
    probe = f"cd {shlex.quote(str(Path.cwd()))} && {shlex.quote(sys.executable)} -m qa_deepspeed.utils.hosts"
    port = ["-p", str(ssh_port)] if ssh_port else []
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    command = ["ssh", *options, *port, "--", host.name, probe]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except FileNotFoundError:
        return ["ssh is not installed here: install the OpenSSH client"]
    except subprocess.TimeoutExpired:
        return [f"{host.name} does not answer within {PROBE_SECONDS} s: check its load and its disks"]
    message = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == 255:  # ssh's own failures
        return [f"{host.name} cannot be reached: {message}; try '{' '.join(['ssh', *port, host.name])} true'"]
    try:
        there = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return [f"{host.name} has no such program at {Path.cwd()} for {sys.executable} ({message}); install it there"]
    return [
        f"{host.name} has {name} {there.get(name, 'none')}, this host has {version}; install the same"
        for name, version in here.items()
        if there.get(name) != version
    ]


def environment_files() -> list[Path]:
    """The files whose variables DeepSpeed's launcher passes to every host."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    return [path for path in (Path.home() / name, Path(name)) if path.is_file()]


def sent_variables() -> list[str]:
    """Names of the variables in those files."""
    lines = [line for path in environment_files() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line.split("=", maxsplit=1)[0] for line in lines if "=" in line]


def faults_of_environment_files() -> list[str]:
    """Lines of those files on which DeepSpeed's launcher fails."""
    return [
        f"{path}, line {number}: '{line}' is not NAME=VALUE, and DeepSpeed's launcher fails on it; correct it"
        for path in environment_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if "=" not in line
    ]


PACKAGES = ("torch", "deepspeed", "transformers")


def versions() -> dict[str, str]:
    """Versions by package, without importing any; of this package a digest of its code, since two checkouts can
    have the same version."""
    found = {name: _version(name) for name in PACKAGES}
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent.parent
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found | {"qa_deepspeed": f"code {digest.hexdigest()[:12]}"}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(json.dumps(versions()))


def require_free_port(port: int) -> str:
    """The line that says that nothing listens on this port here.

    Raises:
        UserError: something does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"port {port} is taken here ({error.strerror}): pass another --master_port, to the launcher too"
            ) from None
    return f"{port} is free here"


def launch_in_words(first: Host) -> str:
    """What DeepSpeed's launcher starts and sends on several hosts."""
    names = ", ".join(sent_variables()) or "nothing"
    return (
        f"DeepSpeed's launcher starts {first.name} as rank 0's host and sends variables that begin with "
        f"{', '.join(ALWAYS_SENT)}, and from .deepspeed_env {names}"
    )
