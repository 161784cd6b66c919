"""Compiling an operator is announced, waiting for another build is reported and bounded, a signal removes the lock."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.file_baton import FileBaton

from qa_deepspeed.engine import compiled_ops
from qa_deepspeed.engine.compiled_ops import BuildLock, builds_reported
from qa_deepspeed.utils.errors import UserError
from tests.distributed.launching import environment


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The build folder of an operator, not built yet."""
    (tmp_path / "cpu_adam").mkdir()
    return tmp_path / "cpu_adam"


def compile_as_torch_does(folder: Path, build: Callable[[], Any]) -> None:
    """The use of the lock in torch.utils.cpp_extension."""
    baton = FileBaton(os.path.join(folder, "lock"))
    if baton.try_acquire():
        try:
            build()
        finally:
            baton.release()
    else:
        baton.wait()


@contextlib.contextmanager
def another_build(folder: Path, seconds: float) -> Iterator[None]:
    """Inside, a thread that has the lock builds for some seconds."""
    locked = threading.Event()

    def build() -> None:
        other = BuildLock(folder / "lock", 60)
        assert other.try_acquire()
        locked.set()
        time.sleep(seconds)
        (folder / "cpu_adam.so").touch()
        other.release()

    building = threading.Thread(target=build)
    building.start()
    assert locked.wait(10)
    yield
    building.join()


def test_a_build_is_announced_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def build() -> None:
        assert sorted(path.name for path in folder.iterdir()) == [".lock.holder", "lock"]
        (folder / "cpu_adam.so").touch()

    for _ in range(2):
        with builds_reported(60):
            compile_as_torch_does(folder, build if not list(folder.iterdir()) else lambda: None)
    assert capsys.readouterr().out == "compiling cpu_adam (takes minutes, once)\n"
    assert [path.name for path in folder.iterdir()] == ["cpu_adam.so"]


def test_outside_torch_has_its_own_lock_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = FileBaton.wait
    with builds_reported(60):
        assert FileBaton.wait is not own
    assert FileBaton.wait is own
    compile_as_torch_does(folder, lambda: None)
    assert capsys.readouterr().out == ""


def test_the_other_build_is_named_and_waited_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with another_build(folder, 0.5), builds_reported(60):
        compile_as_torch_does(folder, lambda: pytest.fail("it was built twice"))
    line = f"waiting for {folder / 'lock'}, another build's lock (process {os.getpid()} on "
    assert line in capsys.readouterr().out


def test_a_lock_that_a_killed_build_left_ends_the_wait_with_advice(folder: Path) -> None:
    (folder / "lock").touch()
    began = time.monotonic()
    with pytest.raises(UserError) as error, builds_reported(0.5):
        compile_as_torch_does(folder, lambda: None)
    assert time.monotonic() - began < 10
    assert re.fullmatch(
        re.escape(f"{folder / 'lock'}: no progress for ") + r"\d+ s \(held by an unknown process\); .*"
        r"if no build is in progress, rm " + re.escape(str(folder / "lock")),
        str(error.value),
    )
    assert (folder / "lock").exists(), "it may be another program's"


def test_a_stale_lock_is_given_up_even_with_a_long_timeout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_ops, "STALE_SECONDS", 0.3)
    (folder / "lock").touch()
    with pytest.raises(UserError, match="no progress"):
        BuildLock(folder / "lock", 1e6).wait()


def test_a_build_that_lives_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than the timeout of the others, and writes nothing for as long."""
    monkeypatch.setattr(compiled_ops, "TOUCH_SECONDS", 0.1)
    with another_build(folder, 2):
        BuildLock(folder / "lock", 0.6).wait()


def test_a_build_that_failed_elsewhere_is_one_line(folder: Path) -> None:
    (folder / "lock").touch()
    threading.Timer(0.3, (folder / "lock").unlink).start()
    with pytest.raises(UserError, match="the other build ended without cpu_adam"):
        BuildLock(folder / "lock", 60).wait()


def test_deepspeeds_wrapping_of_the_error_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own optimizer waits for a lock that stays; nothing is compiled."""
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    with pytest.raises(UserError, match="cpu_adam/lock: no progress"), builds_reported(0.5):
        DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(4))])


BUILDS = """if True:
    import signal, sys
    from torch.utils import cpp_extension
    from qa_deepspeed.engine.compiled_ops import builds_reported
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    folder = sys.argv[1]
    with builds_reported(60):
        cpp_extension.load("cpu_adam", [folder + "/one.cpp"], build_directory=folder)
"""

NINJA = """#!/bin/sh
[ "$1" = --version ] && echo 1.11.1 && exit
echo $$ > building
exec sleep 600
"""


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_the_build_and_removes_the_lock(tmp_path: Path, folder: Path, number: int) -> None:
    """By torch's own building, with a ninja that does not end. Only a kill leaves the lock."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ninja").write_text(NINJA)
    (tmp_path / "bin/ninja").chmod(0o755)
    (folder / "one.cpp").touch()
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    with subprocess.Popen(
        [sys.executable, "-c", BUILDS, str(folder)],
        env={**environment(), "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "compiling cpu_adam (takes minutes, once)\n"
        while not (folder / "building").exists() or not (folder / "building").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        try:
            process.wait(30)
        finally:
            process.kill()
    ninja = int((folder / "building").read_text())
    assert process.returncode == (1 if number == signal.SIGINT else -number) or process.returncode == -signal.SIGINT
    assert (folder / "lock").exists() == (number == signal.SIGKILL)
    if number == signal.SIGKILL:
        os.kill(ninja, signal.SIGKILL)
    else:
        with pytest.raises(ProcessLookupError):
            os.kill(ninja, 0)
