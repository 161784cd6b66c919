"""The runs of a sweep as processes: how one is started, on which GPUs, and what becomes of them on a signal."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa_deepspeed.config import options
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.runs.lock import user_of
from qa_deepspeed.runs.requeue import REQUEUE_STATUS
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import write_bytes
from qa_deepspeed.utils.json_files import ANYTHING, DamagedFile, read_json
from qa_deepspeed.utils.progress import clock

POLL_SECONDS = 0.2

RECORD = {"status": str, "options": {str: ANYTHING}, "metrics": {str: ANYTHING}}
"""What is read of a finished run's run.json, by `json_files.fault_of`."""

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when the one that started it ends."""

ERROR = "qa-deepspeed: error: "
"""Begins the line that says why a run failed."""


@dataclass(frozen=True)
class SweepRun:
    """One run: its name, what is varied but the seed, its output folder and options."""

    name: str
    setting: str
    folder: Path
    options: RunOptions

    @property
    def config(self) -> Path:
        """The run's YAML file, beside its folder: a folder that holds files but no run would be refused."""
        return self.folder.parent / "configs" / f"{self.name}.yaml"

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.folder.parent / "logs" / f"{self.name}.log"

    def write_config(self) -> None:
        """Write the YAML file, from which `qa-deepspeed train --config` starts the same run."""
        self.config.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.config, (options.as_yaml(self.options, "train") + "\n").encode())


def finished_record(run: SweepRun) -> dict[str, Any] | None:
    """The record of a run that is finished with these options; else None: `train` decides what is to be done.

    A damaged record is none.
    """
    try:
        record: dict[str, Any] | None = read_json(run.folder / "run.json", RECORD)
    except DamagedFile:
        return None
    if record is None or record["status"] != "finished" or not {"f1", "exact"} <= record["metrics"].keys():
        return None
    ours = run.options.to_dict()
    same = all(record["options"].get(name) == ours[name] for name in run.options.given)
    return record if same else None


@dataclass(frozen=True)
class Launch:
    """How runs are started: ranks of each, words before `qa_deepspeed train`, runs at once, GPUs of this host."""

    ranks: int
    launcher: str | None
    at_once: int
    gpus: tuple[str, ...]

    @classmethod
    def of(cls, run_options: RunOptions, ranks: int, launcher: str | None, at_once: int | None) -> Launch:
        """As many runs at once as GPUs are there for, unless `at_once` says otherwise.

        Raises:
            UserError: numbers below 1, or more ranks than GPUs.
        """
        if ranks < 1 or (at_once is not None and at_once < 1):
            raise UserError("--ranks and --at_once must be at least 1")
        if launcher is not None and ranks != 1:
            raise UserError("--launcher says how many ranks a run has: leave --ranks out")
        gpus = () if run_options.no_cuda or launcher is not None else visible_gpus()
        if gpus and len(gpus) < ranks:
            raise UserError(f"--ranks {ranks}: a run has a GPU for each rank, and here are {len(gpus)}")
        fitting = max(1, len(gpus) // ranks)
        return cls(ranks, launcher, fitting if at_once is None else at_once, gpus)

    def command(self, run: SweepRun) -> list[str]:
        """The words that start a run."""
        call = ["train", "--config", str(run.config), "--output_dir", str(run.folder)]
        if self.launcher is not None:
            return [*shlex.split(self.launcher), "qa_deepspeed", *call]
        if self.ranks == 1:
            return [sys.executable, "-m", "qa_deepspeed", *call]
        torchrun = [sys.executable, "-m", "qa_deepspeed.torchrun", "--standalone", "--nproc_per_node", str(self.ranks)]
        return [*torchrun, "-m", "qa_deepspeed", *call]

    def environment(self, slot: int) -> dict[str, str]:
        """The environment of the run in a slot (0 to at_once - 1): GPUs of its own while there are enough."""
        first = slot * self.ranks % len(self.gpus) if self.gpus else 0
        own = self.gpus[first : first + self.ranks]
        return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(own)} if own and self.at_once > 1 else dict(os.environ)


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = [str(number) for number in range(torch.cuda.device_count())]
    return tuple(named.split(",")[: len(numbers)] if named else numbers)


def _ended_with_sweep() -> Callable[[], None] | None:
    """What a run does before it starts: ask for SIGTERM when the sweep ends, since a killed sweep sends none.

    None where there is no such call (on Linux alone): then the next sweep waits until the run ends.
    """
    if sys.platform != "linux":
        return None
    prctl, sweep = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != sweep:  # killed already
            os._exit(128 + signal.SIGTERM)

    return ask


class _Started:
    """A run that was started, in a session of its own: signals reach it through the sweep, or when that is killed."""

    def __init__(self, run: SweepRun, launch: Launch, slot: int) -> None:
        self.run, self.slot, self.began = run, slot, time.monotonic()
        self._terminated = False
        self._signal_group = launch.launcher is not None
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with open(run.log, "ab") as log:
            try:
                self.process = subprocess.Popen(
                    launch.command(run),
                    env=launch.environment(slot),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_ended_with_sweep(),
                )
            except OSError as error:
                raise UserError(f"--launcher '{launch.launcher}' cannot be started: {error.strerror}") from None

    def terminate(self) -> None:
        """SIGTERM, once: a run takes another one, more than ten seconds later, as a call to end at once."""
        if not self._terminated:
            self._terminated = True
            if self._signal_group:  # the deepspeed command passes no signal on; --launcher may be it
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGTERM)
            else:
                self.process.terminate()

    def outcome(self, status: int) -> str:
        """How the run ended, in words."""
        took = clock(time.monotonic() - self.began)
        record = finished_record(self.run)
        if status == 0 and record is not None:
            return f"{self.run.name}: F1 {record['metrics']['f1']:.2f}, exact {record['metrics']['exact']:.2f} ({took})"
        if status == REQUEUE_STATUS:
            return f"{self.run.name}: preempted after {took}"
        lines = [line for line in self.run.log.read_text(encoding="utf-8", errors="replace").splitlines() if line]
        said = next((line for line in reversed(lines) if line.startswith(ERROR)), lines[-1] if lines else "")
        return f"{self.run.name}: failed with status {status} after {took}: {said.removeprefix(ERROR)}"


class _Queue:
    """The runs that are to be started, in their order."""

    def __init__(self, runs: list[SweepRun]) -> None:
        self.waiting = runs
        self._said: set[str] = set()

    def take(self) -> SweepRun | None:
        """The next run; None while another process uses its folder, which is said once, or where none is left."""
        if not self.waiting:
            return None
        run = self.waiting[0]
        user = user_of(run.folder)
        if user is None:
            return self.waiting.pop(0)
        if run.name not in self._said:
            self._said.add(run.name)
            print(f"{run.name}: {user} still uses {run.folder}: waiting until it ends", flush=True)
        return None


def run_all(runs: Sequence[SweepRun], launch: Launch) -> dict[str, int]:
    """Run those that are not finished; the exit status of each by name, of those only that were reached.

    While another process uses the folder of the next run (that of a killed sweep, which saves), none is started.
    After a signal nothing more is started: the running ones get SIGTERM, on which they save and end.
    """
    statuses = {run.name: 0 for run in runs if finished_record(run) is not None}
    if statuses:
        print(f"{len(statuses)} of {len(runs)} runs are finished and kept", flush=True)
    queue = _Queue([run for run in runs if run.name not in statuses])
    running: list[_Started] = []
    with _stopping() as stop:
        while running or (queue.waiting and not stop):
            while not stop and len(running) < launch.at_once and (run := queue.take()) is not None:
                if finished_record(run) is not None:
                    statuses[run.name] = 0
                    print(f"{run.name}: finished meanwhile, and kept", flush=True)
                    continue
                slot = min(set(range(launch.at_once)) - {one.slot for one in running})
                print(f"run {runs.index(run) + 1} of {len(runs)}: {run.name} (log: {run.log})", flush=True)
                running.append(_Started(run, launch, slot))
            for one in running if stop else ():
                one.terminate()
            for one in list(running):
                status = one.process.poll()
                if status is not None:
                    running.remove(one)
                    ended = REQUEUE_STATUS if stop and status != 0 else status
                    statuses[one.run.name] = ended if ended != 0 or finished_record(one.run) is not None else 1
                    print(one.outcome(ended), flush=True)
                    if ended == REQUEUE_STATUS:
                        stop.append(REQUEUE_STATUS)  # what preempted a run, preempts all
            time.sleep(POLL_SECONDS)
    return statuses


@contextlib.contextmanager
def _stopping() -> Iterator[list[int]]:
    """A list that gets the numbers of signals which end the sweep."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda got, frame: received.append(got)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
