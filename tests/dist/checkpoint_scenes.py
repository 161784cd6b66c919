"""One rank of a launch that plays many scenes with checkpoints: `-m tests.dist.checkpoint_scenes OPTIONS.json FOLDER`.

All in one launch, since starting costs more than training a tiny model. Every rank asserts; one that fails ends all.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qa_deepspeed import dist
from qa_deepspeed.checkpoint_files import LOOP_FILE, MANIFEST_FILE, checkpoints
from qa_deepspeed.config import RunOptions
from qa_deepspeed.errors import UserError
from qa_deepspeed.train import train

OPTIONS: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
FOLDER = Path(sys.argv[2])


class Listener(io.StringIO):
    """What is printed; does something once when it reads a text (on rank 0, where the log is)."""

    def __init__(self, text: str, act: Callable[[], None]) -> None:
        super().__init__()
        self._text, self._act = text, act

    def write(self, part: str) -> int:
        written = super().write(part)
        if self._text and self._text in self.getvalue():
            self._text = ""
            self._act()
        return written


def run(name: str, when: str = "", act: Callable[[], None] = lambda: None, **changes: object) -> str:
    """Train into FOLDER/name; returns what this rank printed, with the error a user would see; `act` at a text."""
    given = {**OPTIONS, "output_dir": str(FOLDER / name), **changes}
    printed = Listener(when, act)
    with contextlib.redirect_stdout(printed):
        try:
            train(RunOptions(**given, given=frozenset(given)))
        except UserError as error:
            print(f"error: {error}")
        except Exception as error:
            if type(error).__name__ != "Stopped":
                raise
            print(f"stopped: {error}")
    dist.barrier()
    return printed.getvalue()


def on_first(act: Callable[[], Any]) -> None:
    """Do something to the files on rank 0 while the others wait."""
    if dist.is_first():
        act()
    dist.barrier()


def unfinished_copy(name: str, new: str) -> None:
    """A copy of a finished run as it was just before its end."""

    def copy() -> None:
        shutil.copytree(FOLDER / name, FOLDER / new)
        run_file = FOLDER / new / "run.json"
        run_file.write_text(json.dumps({**json.loads(run_file.read_text()), "status": "running"}))
        (FOLDER / new / "model.safetensors").unlink()

    on_first(copy)


def same_model(one: str, other: str) -> bool:
    """Whether two runs ended with the same bytes."""
    return (FOLDER / one / "model.safetensors").read_bytes() == (FOLDER / other / "model.safetensors").read_bytes()


def noise(path: Path) -> None:
    """Other bytes, the same size."""
    path.write_bytes(os.urandom(path.stat().st_size))


def damaged_checkpoints_are_named_and_passed_over() -> None:
    """The newest has lost its state, a shard of the one before is noise: the first is taken, the end is the same."""
    unfinished_copy("whole", "damaged")
    folder = FOLDER / "damaged"
    on_first(lambda: (folder / "checkpoint-6" / LOOP_FILE).unlink())
    on_first(lambda: noise(next((folder / "checkpoint-4").glob("*rank_1*optim_states.pt"))))
    printed = run("damaged")
    if dist.is_first():
        assert f"checkpoint-6 is damaged and not used: {LOOP_FILE} is missing" in printed, printed
        assert "optim_states.pt does not hold what was written" in printed, printed
        assert "checkpoint-2, step 2 of 6" in printed, printed
    assert same_model("whole", "damaged")


def nothing_starts_from_zero_in_silence() -> None:
    """No checkpoint is whole: that is said, on all ranks."""
    unfinished_copy("whole", "lost")
    for step in (2, 4, 6):
        on_first(lambda step=step: (FOLDER / "lost" / f"checkpoint-{step}" / MANIFEST_FILE).unlink())
    printed = run("lost")
    assert "error: no checkpoint in" in printed, printed
    assert not dist.is_first() or printed.count(f"{MANIFEST_FILE} is missing") == 3
    assert not (FOLDER / "lost/model.safetensors").exists()


def a_limit_keeps_the_last_ones() -> None:
    """Also by share of the run: a third of 6 steps."""
    run("few", save_steps=1 / 3, save_total_limit=2)
    assert [path.name for path in checkpoints(FOLDER / "few")] == ["checkpoint-4", "checkpoint-6"]
    assert same_model("whole", "few")


def the_clock_saves_and_stops() -> None:
    """Rank 0's clock says for all when to save and when to stop; the same command goes on from there."""
    printed = run("clock", "step 3/6", lambda: time.sleep(2), save_steps=0, save_on_time="2s")
    assert [path.name for path in checkpoints(FOLDER / "clock")] == ["checkpoint-3"], printed
    printed = run("clock_stops", "step 3/6", lambda: time.sleep(8), save_steps=0, max_time="8s")
    assert "stopped: stopped by max_time after step 3 of 6" in printed, printed
    assert json.loads((FOLDER / "clock_stops/requeue").read_text())["reason"] == "max_time"
    again = run("clock_stops", save_steps=0)
    assert same_model("whole", "clock_stops") and (not dist.is_first() or "step 3 of 6" in again)
    assert not (FOLDER / "clock_stops/requeue").exists()


def a_signal_on_one_rank_stops_all_after_the_step() -> None:
    """Two that follow at once are one."""

    def warn() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)

    printed = run("signal", "step 4/6", warn, save_steps=0)
    assert "stopped: stopped by SIGUSR1 after step 4 of 6" in printed, printed
    run("signal", save_steps=0)
    assert same_model("whole", "signal")


SCENES = (
    damaged_checkpoints_are_named_and_passed_over,
    nothing_starts_from_zero_in_silence,
    a_limit_keeps_the_last_ones,
    the_clock_saves_and_stops,
    a_signal_on_one_rank_stops_all_after_the_step,
)


def main() -> None:
    """Play every scene after a whole run that they compare with."""
    dist.describe_lone_process()
    run("whole")
    assert [path.name for path in checkpoints(FOLDER / "whole")] == [f"checkpoint-{step}" for step in (2, 4, 6)]
    for scene in SCENES:
        scene()
        dist.log0(f"played: {scene.__name__}")
    dist.stop()


if __name__ == "__main__":
    main()
