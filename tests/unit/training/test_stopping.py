"""Durations and save intervals as users write them; the lock of an output folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from qa_deepspeed.runs.lock import RunLock
from qa_deepspeed.training.stopping import duration, save_interval
from qa_deepspeed.utils.errors import UserError


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("2h", 7200), ("1h30m", 5400)])
def test_durations_are_parsed(text: str, seconds: float) -> None:
    assert duration(text, "max_time") == seconds


def test_no_time_limit_is_infinite() -> None:
    assert duration(None, "max_time") == float("inf")


@pytest.mark.parametrize("text", ["", "15", "0m", "m", "-1h", "1.5h", "30m1h", "soon"])
def test_invalid_durations_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="max_time"):
        duration(text, "max_time")


@pytest.mark.parametrize(
    ("save_steps", "steps", "interval"),
    [(500, 12, 500), (0, 12, 0), (0.1, 1000, 100), (0.25, 10, 2), (0.001, 10, 1), (1, 5, 1)],
)
def test_save_interval_is_a_number_or_a_fraction_of_the_run(save_steps: float, steps: int, interval: int) -> None:
    assert save_interval(save_steps, steps) == interval


@pytest.mark.parametrize("save_steps", [-1, 1.5, -0.1, float("inf"), float("nan")])
def test_invalid_save_intervals_are_refused(save_steps: float) -> None:
    with pytest.raises(UserError, match="save_steps"):
        save_interval(save_steps, 100)


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
