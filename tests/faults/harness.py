"""Runs of the command line on a disk whose n-th call fails, and what must be true after each.

A fault is survived if the output has no traceback, no file under a final name is partial, nothing half written is left,
a success is a whole one, and the same command without the fault gives the bytes of a run without faults.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import environment, flags
from tests.paths import REPOSITORY

CALLS = ("write", "rename", "fsync", "allocate", "mmap")
"""Kinds of calls, in the order of `failing_calls.c`."""

ERRORS = (errno.ENOSPC, errno.EIO)

REQUEUE, MISTAKE = 75, 2

SOURCE = Path(__file__).parent / "failing_calls.c"


def compile_library(folder: Path) -> Path:
    """The library that is preloaded; the test is skipped where it cannot be made."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler (cc or gcc), to make calls of the disk fail")
    library = folder / "failing_calls.so"
    subprocess.run(
        [compiler, "-Wall", "-Werror", "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"], check=True
    )
    return library


@dataclass(frozen=True)
class Fault:
    """Call number `at` of a kind fails with an error number; with `stays` all later ones of the kind fail too."""

    scenario: str
    call: str
    at: int
    error: int
    stays: bool

    def __str__(self) -> str:
        again = " and all later ones" if self.stays else ""
        return f"{self.scenario}: {self.call} {self.at}{again}, {errno.errorcode[self.error]}"


@dataclass(frozen=True)
class Outcome:
    """What became of a command."""

    status: int | None
    """Exit status; negative for a signal, None for a process that hung."""
    counts: dict[str, int]
    hits: int
    output: str


class Server:
    """The process of `server.py`."""

    def __init__(self, library: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server", str(library)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=environment(LD_PRELOAD=str(library)),
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(self, arguments: Sequence[str], folder: Path, fault: Fault | None = None, learn: bool = False) -> Outcome:
        """Run a command line; only calls on files under `folder` count, and fail by `fault`.

        learn: the server imports what the command imported, for the next ones.
        """
        output = folder.with_name(f"{folder.name}.log")
        request = {
            "arguments": list(arguments),
            "output": str(output),
            "folder": str(folder),
            "call": -1 if fault is None else CALLS.index(fault.call),
            "at": 0 if fault is None else fault.at,
            "error": 0 if fault is None else fault.error,
            "stays": fault is not None and fault.stays,
            "learn": learn,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._answer())
        text = output.read_text(encoding="utf-8", errors="replace")
        return Outcome(answer["status"], dict(zip(CALLS, answer["counts"], strict=True)), answer["hits"], text)

    def close(self) -> None:
        """End the process, which has nothing to finish."""
        self._process.kill()
        self._process.communicate()


class Scenario:
    """A command that writes into `out` of a folder, and the files by which two runs of it are compared."""

    def __init__(self, command: Sequence[str], into: str, files: Sequence[str], **options: object) -> None:
        """into: the option that names the folder, or "" where it is the last argument."""
        self._command, self._into, self._files, self._options = list(command), into, files, options

    def arguments(self, folder: Path) -> list[str]:
        """The command line that writes into this folder."""
        out = folder / "out"
        place = [f"--{self._into}", str(out)] if self._into else [str(out)]
        return [*self._command, *place, *flags(**self._options)]

    def results(self, folder: Path) -> dict[str, str]:
        """SHA-256 of the compared files that are there, by path in `out`."""
        out = folder / "out"
        found = sorted({path for pattern in self._files for path in out.glob(pattern)})
        return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}

    @property
    def may_run_again(self) -> bool:
        """Whether the command accepts its own finished output."""
        return self._command[0] != "export"


ANSWERS = ("predictions.json", "nbest_predictions.json", "null_odds.json", "metrics.json")


class Bench:
    """The scenarios, their runs without faults, and the server. `folder` has sample/ of `write_sample`."""

    def __init__(self, folder: Path, server: Server) -> None:
        self._folder, self._server = folder, server
        self.scenarios = self._scenarios()
        self.counts: dict[str, dict[str, int]] = {}
        self._expected: dict[str, dict[str, str]] = {}
        for name, scenario in self.scenarios.items():
            for turn in ("warm", "whole"):  # the first builds the cache of features, which the others share
                work = folder / f"{turn}-{name}"
                work.mkdir()
                done = server.run(scenario.arguments(work), work, learn=turn == "warm")
                assert done.status == 0, done.output
                self.counts[name], self._expected[name] = done.counts, scenario.results(work)
            assert scenario.results(folder / f"warm-{name}") == self._expected[name] != {}

    def _scenarios(self) -> dict[str, Scenario]:
        sample = self._folder / "sample"
        shape = {"version_2_with_negative": True, "max_seq_length": 160, "doc_stride": 64}
        train = Scenario(
            ["train"],
            "output_dir",
            ("model.safetensors", "config.json", "tokenizer*", *ANSWERS),
            **shape,
            model_name_or_path=sample / "model",
            train_file=sample / "train.json",
            predict_file=sample / "dev.json",
            cache_dir=self._folder / "cache",
            max_train_examples=24,
            max_eval_examples=24,
            max_steps=4,
            save_steps=2,
            save_total_limit=1,
            logging_steps=2,
            do_eval=True,
            evaluate_during_training=True,
            save_retry=0,
            learning_rate=1e-3,
        )
        evaluate = Scenario(
            ["evaluate"],
            "output_dir",
            ANSWERS,
            **shape,
            model_name_or_path=self._folder / "whole-train/out",
            predict_file=sample / "dev.json",
            cache_dir=self._folder / "cache",
            max_eval_examples=24,
            gather="full",
        )
        prepare = Scenario(
            ["prepare"],
            "cache_dir",
            ("features/*/*.arrow", "features/*/manifest.json", "features/*/rejected.json"),
            **shape,
            model_name_or_path=sample / "model",
            train_file=sample / "train.json",
            predict_file=sample / "dev.json",
        )
        checkpoint = self._folder / "whole-train/out/checkpoint-4"
        export = Scenario(["export", str(checkpoint)], "", ("model.safetensors", "config.json", "tokenizer*"))
        return {"train": train, "evaluate": evaluate, "prepare": prepare, "export": export}

    def faults(self, number: int, chance: random.Random) -> list[Fault]:
        """So many different faults: all pairs of scenario and call in turn, the rest by chance."""
        pairs = [(name, call) for name, counts in self.counts.items() for call in CALLS if counts[call]]
        found: dict[Fault, None] = {}
        turns = 0
        while len(found) < number:
            if turns % len(pairs) == 0:
                chance.shuffle(pairs)
            name, call = pairs[turns % len(pairs)]
            at = chance.randint(1, self.counts[name][call])
            found[Fault(name, call, at, chance.choice(ERRORS), chance.random() < 0.5)] = None
            turns += 1
        return list(found)

    def survive(self, fault: Fault, number: int) -> str:
        """Run with the fault, then without; returns what the first did: "ended", "continued" or "not reached".

        Raises:
            AssertionError: the fault was not survived.
        """
        scenario, work = self.scenarios[fault.scenario], self._folder / f"fault-{number}"
        work.mkdir()
        done = self._server.run(scenario.arguments(work), work, fault)
        self._check(fault, work, done)
        if done.status or scenario.may_run_again:
            again = self._server.run(scenario.arguments(work), work)
            assert again.status == 0, f"{fault}: the same command fails\n{done.output}\n---\n{again.output}"
        assert scenario.results(work) == self._expected[fault.scenario], f"{fault}: other results\n{done.output}"
        left = list(half_written(work))
        assert not left, f"{fault}: {left} after the same command"
        shutil.rmtree(work)
        return "ended" if done.status else "continued" if done.hits else "not reached"

    def _check(self, fault: Fault, work: Path, done: Outcome) -> None:
        scenario = self.scenarios[fault.scenario]
        assert "Traceback" not in done.output, f"{fault}: {done.output}"
        assert done.status in (0, MISTAKE, REQUEUE), f"{fault}: status {done.status}\n{done.output}"
        errors = [line for line in done.output.splitlines() if line.startswith("qa-deepspeed: error: ")]
        assert len(errors) == (done.status != 0), f"{fault}: {done.output}"
        if done.status == 0:
            assert scenario.results(work) == self._expected[fault.scenario], f"{fault}: no whole success\n{done.output}"
        elif not scenario.may_run_again:
            assert not (work / "out").exists(), f"{fault}: {sorted((work / 'out').iterdir())} is left"
        wrong = [*partial_files(work), *half_written(work)]
        assert not wrong, f"{fault}: {wrong}\n{done.output}"
        expected = self._expected[fault.scenario]
        for name, digest in scenario.results(work).items():
            assert not name.endswith(".arrow") or digest == expected[name], f"{fault}: {name} is partial"


def partial_files(folder: Path) -> Iterator[str]:
    """Files and checkpoints under a final name that are not whole."""
    from safetensors import SafetensorError, safe_open

    from qa_deepspeed.engine.checkpoints.checkpoint_files import checkpoints, verify_checkpoint

    for path in folder.rglob("*"):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt") as tensors:
                    assert list(tensors.keys())
            elif path.suffix == ".html":
                assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
        except (ValueError, AssertionError, SafetensorError) as error:
            yield f"{path.relative_to(folder)}: {error}"
    for checkpoint in checkpoints(folder / "out"):
        problem = verify_checkpoint(checkpoint)
        if problem:
            yield f"{checkpoint.name}: {problem}"


def half_written(folder: Path) -> Iterator[str]:
    """What a command that ended should have removed."""
    for path in folder.rglob("*"):
        if path.name.endswith(".tmp") or "partial" in path.name or path.name.startswith(".previous-run"):
            yield str(path.relative_to(folder))


def table(faults: Mapping[Fault, str]) -> str:
    """The outcomes of survived faults by scenario, call and error."""
    counts: dict[tuple[str, str, str], Counter[str]] = {}
    for fault, outcome in faults.items():
        row = (fault.scenario, fault.call, errno.errorcode[fault.error])
        counts.setdefault(row, Counter())[outcome] += 1
    lines = ["| run | call | error | injected | ended in one line | continued | same command: same bytes |"]
    lines.append("|---|---|---|---|---|---|---|")
    total: Counter[str] = Counter()
    for row, found in [*sorted(counts.items()), (("all", "", ""), total)]:
        ended, continued = found["ended"], found["continued"]
        total += found
        injected = ended + continued
        lines.append(f"| {' | '.join(row)} | {injected} | {ended} | {continued} | {injected} |")
    return "\n".join(lines)


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    """A server whose library is compiled into `folder`."""
    running = Server(compile_library(folder))
    try:
        yield running
    finally:
        running.close()


def preload(library: Path, folder: Path, fault: Fault) -> dict[str, str]:
    """Environment variables of a process of its own in which this fault happens."""
    return {
        "LD_PRELOAD": str(library),
        "FAULT_FOLDER": os.path.realpath(folder),
        "FAULT_CALL": fault.call,
        "FAULT_AT": str(fault.at),
        "FAULT_ERROR": str(fault.error),
        "FAULT_STAYS": str(int(fault.stays)),
    }
