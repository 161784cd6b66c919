"""Durations as users write them, Ctrl-C in the loop, the lock of an output folder."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.runs.lock import RunLock
from qa_deepspeed.training.stopping import SAME_PRESS_SECONDS, SIGNALS, StopController, duration
from qa_deepspeed.utils.errors import UserError
from tests.paths import REPOSITORY


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("2h", 7200), ("1h30m", 5400)])
def test_durations_are_parsed(text: str, seconds: float) -> None:
    assert duration(text, "max_time") == seconds


def test_no_time_limit_is_infinite() -> None:
    assert duration(None, "max_time") == float("inf")


@pytest.mark.parametrize("text", ["", "15", "0m", "m", "-1h", "1.5h", "30m1h", "soon"])
def test_invalid_durations_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="max_time"):
        duration(text, "max_time")


def test_a_folder_is_locked_by_one_running_process(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from qa_deepspeed.runs.lock import RunLock; "
        "lock = RunLock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with pytest.raises(UserError, match=f"process {other.pid} on "):
                RunLock(tmp_path, patience=0.3)
        finally:
            other.kill()
    RunLock(tmp_path, patience=5).release()
    RunLock(tmp_path, patience=0).release()


def test_a_lock_file_that_its_holder_removes_is_made_anew(tmp_path: Path) -> None:
    """A process that waited for it does not hold a lock on a file that is gone."""
    waiting = RunLock(tmp_path)
    (tmp_path / ".lock").unlink()
    assert not waiting._take(tmp_path) and waiting._take(tmp_path)
    waiting.release(remove=True)
    assert not list(tmp_path.iterdir())


BUSY_STEP = """
import hashlib, sys, tempfile
from pathlib import Path
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.training.stopping import StopController

def busy(rounds):  # no instruction of the interpreter is executed meanwhile
    hashlib.pbkdf2_hmac("sha256", b"step", b"salt", rounds)

with StopController(RunOptions(), Path(tempfile.gettempdir()), process_ends=True) as stops, stops.looping(0):
    print("looping", flush=True)
    busy(int(sys.argv[1]))
    print(stops.after_step(1, 2), flush=True)
"""


@pytest.fixture
def busy_step(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of a step of the training loop."""
    command = [sys.executable, "-c", BUSY_STEP, str(request.param)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed_interrupts
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "looping\n"
        yield process
        process.kill()


def heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it


@pytest.mark.parametrize("busy_step", [10**9], indirect=True)
def test_ctrl_c_is_answered_in_the_step_and_a_second_one_ends_it(busy_step: "subprocess.Popen[str]") -> None:
    """The step would take minutes."""
    assert busy_step.stdout is not None
    began = time.monotonic()
    for _ in range(3):  # of the terminal and the launcher: one press
        busy_step.send_signal(signal.SIGINT)
    assert busy_step.stdout.readline() == "SIGINT: stopping after this step; again within 10 s ends now\n"
    time.sleep(SAME_PRESS_SECONDS + 0.2)
    assert busy_step.poll() is None
    busy_step.send_signal(signal.SIGTERM)  # of a launcher
    time.sleep(0.2)
    assert busy_step.poll() is None
    busy_step.send_signal(signal.SIGINT)
    assert busy_step.wait(timeout=10) == 130
    assert "the same command resumes from the last checkpoint" in busy_step.stdout.read()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("busy_step", [2 * 10**6], indirect=True)
def test_one_ctrl_c_saves_and_stops_after_the_step(busy_step: "subprocess.Popen[str]") -> None:
    busy_step.send_signal(signal.SIGINT)
    printed, _ = busy_step.communicate(timeout=60)
    assert "SIGINT: stopping after this step" in printed
    assert "StepDecision(save=True, stop='SIGINT')" in printed
    assert busy_step.returncode == 0


def test_a_process_that_lives_on_gets_its_handlers_back(tmp_path: Path) -> None:
    """A notebook's: the first Ctrl-C stops after the step, a second one interrupts it and the process stays."""
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with StopController(RunOptions(), tmp_path, process_ends=False) as stops, stops.looping(0):
            signal.raise_signal(signal.SIGINT)
            assert stops.after_step(1, 2).stop == "SIGINT"
            signal.raise_signal(signal.SIGINT)  # of the same press
            time.sleep(SAME_PRESS_SECONDS + 0.2)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before
