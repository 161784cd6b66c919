"""Plant faults one at a time and report those that the tests named for them do not notice.

    python -m tests.mutants [--list] [WORD ...]

takes the faults whose table, name or file holds all the words; without words all of them. Exit status 1 if one survives
or a test fails without any fault.

The libraries that take long to import are imported once; each run of pytest is a fork of this process.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mutants.planting import Fault, copy_checkout, load_faults

SLOW_IMPORTS = ("torch", "transformers", "transformers.modeling_utils", "pyarrow", "tokenizers", "hypothesis", "peft")
LIMIT_SECONDS = 400
"""A test that runs longer hangs: it noticed the fault."""

OUTCOMES = {0: "survived", 1: "caught", -signal.SIGKILL: "caught (hangs)"}
"""By the exit status of pytest; others mean that the tests could not be run."""


@dataclass
class Job:
    """A run of pytest in a process of its own, with a fault or (None) without."""

    fault: Fault | None
    tests: tuple[str, ...]
    tree: Path
    process: int
    began: float

    @property
    def log(self) -> Path:
        """What pytest printed."""
        return log_of(self.tree)


def log_of(tree: Path) -> Path:
    """The file beside a copy of the checkout for what pytest prints there."""
    return tree.with_suffix(".log")


def run_pytest(tree: Path, tests: tuple[str, ...]) -> int:
    """Start pytest in `tree`; returns the process's id."""
    process = os.fork()
    if process:
        return process
    status = 3
    try:
        os.setsid()
        with log_of(tree).open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        sys.dont_write_bytecode = True  # a file that is planted twice in a second would be read from its old bytecode
        os.environ.update(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1")
        os.environ["QA_DEEPSPEED_SHARED"] = str(tree / "absent")  # tests with data of our own must notice
        for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "qa_deepspeed")]:
            del sys.modules[name]
        status = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests]))
    finally:
        os._exit(status)


@contextmanager
def planted(fault: Fault | None, tree: Path) -> Iterator[None]:
    """The fault is in `tree` inside."""
    if fault is None:
        yield
        return
    path = tree / fault.file
    original = path.read_text(encoding="utf-8")
    path.write_text(fault.planted_in(original), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(original, encoding="utf-8")


def outcome(job: Job) -> str:
    """Wait for a run and say how it ended."""
    while True:
        ended, status = os.waitpid(job.process, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - job.began > LIMIT_SECONDS:
            os.killpg(job.process, signal.SIGKILL)
        time.sleep(0.05)
    return OUTCOMES.get(os.waitstatus_to_exitcode(status), "ERROR: the tests cannot be run")


def run_one(fault: Fault | None, tests: tuple[str, ...], tree: Path) -> str:
    """Run `tests` with the fault; returns the outcome, printed with pytest's last lines where it needs a look."""
    with planted(fault, tree):
        job = Job(fault, tests, tree, run_pytest(tree, tests), time.monotonic())
        found = outcome(job)
    seconds = time.monotonic() - job.began
    if fault is None:
        found = "ok" if found == "survived" else "ERROR: fails without a fault"
    print(f"{found:10} {seconds:5.1f} s  {fault or ' '.join(tests)}", flush=True)
    if "ERROR" in found:
        print("".join(f"    {line}\n" for line in job.log.read_text().splitlines()[-25:]), flush=True)
    return found


def main() -> int:
    """Run the faults that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only faults whose table, name or file holds all of these")
    parser.add_argument("--list", action="store_true", help="print the faults and run nothing")
    parser.add_argument("--no_baseline", action="store_true", help="do not run the tests without a fault first")
    asked = parser.parse_args()
    texts = {f"{fault} {fault.file}": fault for fault in load_faults()}
    faults = [fault for text, fault in texts.items() if all(word in text for word in asked.words)]
    if asked.list or not faults:
        print("\n".join(map(str, faults)) or "no such fault")
        return 0 if faults else 2
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        copy_checkout(tree)
        for fault in faults:  # before the first run, so that a table that has lost its lines is seen at once
            fault.planted_in((tree / fault.file).read_text(encoding="utf-8"))
        baselines = [] if asked.no_baseline else list(dict.fromkeys(fault.tests for fault in faults))
        found = [run_one(None, tests, tree) for tests in baselines]
        found += [run_one(fault, fault.tests, tree) for fault in faults]
    return summarize(faults, found[len(baselines) :], any("ERROR" in each for each in found))


def summarize(faults: list[Fault], found: list[str], errors: bool) -> int:
    """Print the faults caught by table, and the survivors; returns the exit status."""
    for table in dict.fromkeys(fault.table for fault in faults):
        of_table = [each for fault, each in zip(faults, found, strict=True) if fault.table == table]
        print(f"{table}: {sum('caught' in each for each in of_table)} of {len(of_table)} caught")
    survivors = [str(fault) for fault, each in zip(faults, found, strict=True) if each == "survived"]
    print("survivors: " + ("; ".join(survivors) or "none"))
    return int(bool(survivors) or errors)


if __name__ == "__main__":
    sys.exit(main())
