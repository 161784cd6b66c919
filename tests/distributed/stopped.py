"""Runs of two ranks, one of which is stopped (SIGSTOP) inside a stage: `-m tests.distributed.stopped PLAN.json FOLDER`.

The plan is a list of trials: `arguments` of the command line, `stage`, `call` (in which call of the stage's function,
from 1), `delay` (seconds after its start), `rank` (which one is stopped), `resumes` (whether it is continued after
`pause` seconds) and `limit` (seconds after which the other rank counts as hanging). Trial N leaves FOLDER/N.json with
`status`, `seconds` (from the stop to the end of the other rank), and `printed` of every rank.

Imports are made once. As under torchrun, the store in which the ranks meet is no rank's.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  what takes long, before the processes part
import torch.distributed

import qa_deepspeed.training.train
from qa_deepspeed.cli.main import main as run_command_line
from qa_deepspeed.engine.checkpoints.checkpoint import CheckpointWriter
from qa_deepspeed.engine.engine import Engine
from qa_deepspeed.qa.cache import prepare
from qa_deepspeed.qa.features import example_store
from qa_deepspeed.training.evaluation import evaluate

STAGES: dict[str, tuple[Any, str]] = {
    "features": (prepare, "build_features"),
    "training": (Engine, "step"),
    "save": (CheckpointWriter, "save"),
    "evaluation": (evaluate, "gather_evaluation"),
    "the end": (qa_deepspeed.training.train, "finish_run"),
}
"""Stage -> the function that is called in it."""


def keep_stores(requests: int, ports: int) -> None:
    """Make a store for each byte that comes in, and write its port; ends with the pipe."""
    stores = []
    while os.read(requests, 1):
        store = torch.distributed.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        stores.append(store)
        os.write(ports, f"{store.port}\n".encode())


def report_calls(stage: str, pipe: int) -> None:
    """Write a byte whenever this process calls the stage's function, which takes half a second more."""
    owner, name = STAGES[stage]
    real: Callable[..., Any] = getattr(owner, name)

    def reported(*arguments: Any, **named: Any) -> Any:
        os.write(pipe, b".")
        time.sleep(0.25)
        result = real(*arguments, **named)
        time.sleep(0.25)
        return result

    setattr(owner, name, reported)


def run_rank(rank: int, port: str, trial: dict[str, Any], pipe: int, output: Path) -> int:
    """Start a rank in a process of its own; returns its id."""
    child = os.fork()
    if child:
        return child
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    size = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ.update(size, RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    example_store.SMALL_SHARD = 12
    report_calls(trial["stage"], pipe)
    faulthandler.register(signal.SIGUSR2)
    status = 1
    try:
        run_command_line(trial["arguments"])
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def ended(process: int) -> int | None:
    """The exit status of a child; None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    """The condition's first value that is not None; None after these seconds."""
    end = time.monotonic() + seconds
    while (value := condition()) is None and time.monotonic() < end:
        time.sleep(0.05)
    return value


def run_trial(trial: dict[str, Any], port: str, folder: Path) -> dict[str, Any]:
    """One trial; its outcome."""
    reader, writer = os.pipe()
    outputs = [folder / f"rank-{rank}" for rank in range(2)]
    for output in outputs:
        output.unlink(missing_ok=True)
    ranks = [run_rank(rank, port, trial, writer, output) for rank, output in enumerate(outputs)]
    os.close(writer)
    for _ in range(trial["call"]):
        os.read(reader, 1)  # or its end, when the ranks have ended
    time.sleep(trial["delay"])
    stopped, other = ranks[trial["rank"]], ranks[1 - trial["rank"]]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    status: list[int | None] = []
    if trial["resumes"]:
        time.sleep(trial["pause"])
        os.kill(stopped, signal.SIGCONT)
        status.append(wait_for(lambda: ended(stopped), trial["limit"]))
    status.insert(0, wait_for(lambda: ended(other), trial["limit"]))
    seconds = time.monotonic() - began
    if status[0] is None:
        os.kill(other, signal.SIGUSR2)  # it prints where it hangs
        time.sleep(1)
    for process in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process, 0)
    os.close(reader)
    return {"status": status, "seconds": seconds, "printed": [output.read_text() for output in outputs]}


def main() -> None:
    """Run each trial of the plan."""
    plan, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    requests, ports = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(requests[1])
        keep_stores(requests[0], ports[1])
        os._exit(0)
    os.close(requests[0])
    for number, trial in enumerate(plan):
        os.write(requests[1], b".")
        outcome = run_trial(trial, os.read(ports[0], 20).decode().strip(), folder)
        (folder / f"{number}.json").write_text(json.dumps(outcome))
    os.close(requests[1])
    os.wait()


if __name__ == "__main__":
    main()
