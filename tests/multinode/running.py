"""A run on several hosts, watched through its output in folder/out.txt."""

import subprocess
import time
from pathlib import Path

import numpy as np

from tests.distributed.launching import losses

TIMEOUT = 20
"""Seconds after which a collective is given up, in the runs that lose a host."""


def output(folder: Path) -> str:
    return (folder / "out.txt").read_text()


def wait_for(text: str, folder: Path, process: subprocess.Popen, seconds: float = 200) -> None:
    """Until the output has `text`."""
    end = time.monotonic() + seconds
    while text not in output(folder):
        assert process.poll() is None and time.monotonic() < end, output(folder)[-5000:]
        time.sleep(0.1)


def assert_equal(run: Path, reference: Path) -> None:
    """Losses of every step, metrics and answers are those of the reference, digit by digit."""
    assert np.array_equal(losses(run), losses(reference))
    names = ("metrics.json", "predictions.json")
    assert all((run / name).read_bytes() == (reference / name).read_bytes() for name in names)
