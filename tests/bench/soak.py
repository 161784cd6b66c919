"""Kill a run with SIGKILL inside each of its phases, start it again by the same command, and compare it with an
uninterrupted one.

    python tests/bench/soak.py --kills 50 --folder FOLDER

The kills are divided over the ZeRO stages; runs have two ranks, dropout, evaluations during training that choose the
best model, and a checkpoint every second step. The ranks record when a phase begins and ends; a kill waits for the
beginning of its phase and then a random part of the phase's median duration in the uninterrupted run. The ranks are
killed one after the other, in random order, up to `LONGEST_GAP_SECONDS` apart. At the end, model, answers and metrics
must equal those of the uninterrupted run, byte for byte, and so must the questions and tokens of every optimizer step,
however often it was repeated.

torchrun starts the uninterrupted run and the last start of the killed one; the killed processes are forked from one
process that has imported the slow libraries, so that fifty kills take minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qa_deepspeed.cli.data.sample import write_sample
from tests.distributed.launching import environment, flags, free_port
from tests.paths import REPOSITORY

STAGES = ("zero0", "zero1", "zero2", "zero3")
STEPS = 24
RANKS = 2
CYCLE = (
    "features",
    "training",
    "writing",
    "loading",
    "evaluation",
    "save",
    "training",
    "writing",
    "evaluation",
    "writing",
    "export",
    "export",
    "finishing",
)
"""Where one kill after another falls; a run comes nearer to its end from kill to kill, then the next one begins."""
MOST_PASSED = {"training": 5, "save": 3, "writing": 3}
"""So many times at most a phase is let begin before the kill; others are killed the first time."""
LONGEST_GAP_SECONDS = 0.3
COMPARED = ("model.safetensors", "metrics.json", "predictions.json", "nbest_predictions.json")
POLL_SECONDS = 0.005

Mark = tuple[float, str, str]
"""Time, "begin" or "end", phase."""


def options(folder: Path, stage: str, name: str) -> list[str]:
    """The flags of a run."""
    return flags(
        model_name_or_path=folder / "sample/model",
        train_file=folder / "sample/train.json",
        predict_file=folder / "sample/dev.json",
        cache_dir=folder / f"{name}.cache",
        output_dir=folder / name,
        deepspeed_config=stage,
        version_2_with_negative=True,
        max_seq_length=160,
        doc_stride=64,
        learning_rate=1e-3,
        max_train_examples=100,
        max_steps=STEPS,
        logging_steps=6,
        save_steps=2,
        save_total_limit=2,
        do_eval=True,
        evaluate_during_training=True,
        metric_for_best_model="f1",
        load_best_model_at_end=True,
        per_gpu_train_batch_size=4,
        gradient_accumulation_steps=2,
    )


def launch(folder: Path, stage: str, name: str) -> None:
    """A start by torchrun, to its end."""
    command = [
        "torchrun",
        "--nproc_per_node",
        str(RANKS),
        "--master_port",
        free_port(),
        str(Path(__file__).resolve()),
        "--rank_of",
        str(folder / name),
        *options(folder, stage, name),
    ]
    with (folder / f"{name}.log").open("ab") as log:
        done = subprocess.run(command, cwd=REPOSITORY, env=environment(), stdout=log, stderr=log)
    assert done.returncode == 0, f"see {log.name}"


class Ranks:
    """A start of a run whose ranks are forked from this process, which has imported all that they need."""

    def __init__(self, folder: Path, stage: str, name: str) -> None:
        self._marks, self._log = folder / f"{name}.marks", folder / f"{name}.log"
        self._begin = self._marks.stat().st_size if self._marks.exists() else 0
        port = free_port()
        self.processes = []
        for rank in range(RANKS):
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(RANKS),
                "LOCAL_WORLD_SIZE": str(RANKS),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            work = (self._log, place, folder / name, options(folder, stage, name))
            self.processes.append(multiprocessing.get_context("fork").Process(target=forked, args=work, daemon=True))
            self.processes[-1].start()

    def marks(self) -> list[Mark]:
        """What rank 0 noted since this start: time, "begin" or "end", phase."""
        return read_marks(self._marks, self._begin)

    def wait(self) -> None:
        """Until all have ended, well."""
        for process in self.processes:
            process.join()
            assert process.exitcode == 0, f"see {self._log}"

    def comes_to(self, phase: str, passed: int) -> bool:
        """Wait until `phase` begins once more after `passed` times; false if the run ends before."""
        while any(process.is_alive() for process in self.processes):
            if sum(mark[1:] == ("begin", phase) for mark in self.marks()) > passed:
                return True
            time.sleep(POLL_SECONDS)
        return False

    def kill(self, chance: random.Random) -> str:
        """SIGKILL for each, one after the other; returns the phase that it met rank 0 in."""
        for process in chance.sample(self.processes, RANKS):
            process.kill()
            time.sleep(chance.uniform(0, LONGEST_GAP_SECONDS))
        for process in self.processes:
            process.join()
        marks = self.marks()
        open_phases = [
            phase
            for index, (_, state, phase) in enumerate(marks)
            if state == "begin" and ("end", phase) not in [mark[1:] for mark in marks[index:]]
        ]
        return f"inside {open_phases[-1]}" if open_phases else f"after {marks[-1][2]}"


def read_marks(file: Path, begin: int = 0) -> list[Mark]:
    """What rank 0 noted after the byte `begin`: time, "begin" or "end", phase."""
    if not file.exists():
        return []
    with file.open() as noted:
        noted.seek(begin)
        lines = [line.split() for line in noted if line.endswith("\n")]
    return [(float(when), state, phase) for when, state, phase in lines]


def durations(marks: list[Mark]) -> dict[str, float]:
    """Phase -> the seconds that it took, the median of all times."""
    began: dict[str, float] = {}
    found: dict[str, list[float]] = {}
    for when, state, phase in marks:
        if state == "begin":
            began[phase] = when
        else:
            found.setdefault(phase, []).append(when - began[phase])
    return {phase: statistics.median(seconds) for phase, seconds in found.items()}


def rows_of(folder: Path, name: str) -> dict[int, set[str]]:
    """Step -> the different lists of rows that it was ever taken with, as text, over all ranks."""
    found: dict[int, set[str]] = {}
    for path in folder.glob(f"{name}.rows.*"):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            found.setdefault(entry["step"], set()).add(json.dumps([entry["questions"], entry["tokens"]]))
    return found


def soak(folder: Path, stage: str, kills: int, phases: list[str], chance: random.Random) -> dict[str, Any]:
    """The uninterrupted run, then the killed one; raises AssertionError where they differ."""
    whole, name = f"{stage}-whole", f"{stage}-killed"
    launch(folder, stage, whole)
    took = durations(read_marks(folder / f"{whole}.marks"))
    took["loading"] = 0.1  # an uninterrupted run loads no checkpoint
    took["features"] = max(took["features"], 0.1)  # rank 0 may have come when the other rank was done
    met, partial, runs = Counter[str](), 0, 1
    for phase in itertools.islice(itertools.cycle(phases), kills):
        if phase == "features":
            shutil.rmtree(folder / f"{name}.cache", ignore_errors=True)
        while True:
            ranks = Ranks(folder, stage, name)
            if ranks.comes_to(phase, chance.randrange(MOST_PASSED.get(phase, 1))):
                break
            ranks.wait()  # the run is done: the kill goes to a new one
            compare(folder, whole, name)
            shutil.rmtree(folder / name)
            runs += 1
        time.sleep(chance.uniform(0, took[phase]))
        met[ranks.kill(chance)] += 1
        partial += bool([*(folder / name).glob("*.partial"), *(folder / name).glob(".model.partial")])
    launch(folder, stage, name)
    compare(folder, whole, name)
    return {
        "stage": stage,
        "kills": dict(met),
        "left something half written": partial,
        "runs compared": runs,
        "seconds inside": {phase: round(seconds, 2) for phase, seconds in took.items()},
    }


def compare(folder: Path, whole: str, killed: str) -> None:
    """The same bytes, and the same rows in every step."""
    for file in COMPARED:
        assert (folder / killed / file).read_bytes() == (folder / whole / file).read_bytes(), f"{killed}: other {file}"
    expected = rows_of(folder, whole)
    assert sorted(expected) == list(range(STEPS)) and all(len(rows) == 1 for rows in expected.values())
    assert rows_of(folder, killed) == expected, f"{killed}: other rows"


def forked(log: Path, place: dict[str, str], run: Path, arguments: list[str]) -> None:
    """A rank in a process of its own, which says everything in the log."""
    os.environ.update(place)
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    be_a_rank(str(run), arguments)


def be_a_rank(run: str, arguments: list[str]) -> None:
    """Train, and write down when phases begin and end (on rank 0), and the questions and tokens of every step."""
    import qa_deepspeed.training.loop as loop
    import qa_deepspeed.training.train as trainer
    from qa_deepspeed.cli.main import main
    from qa_deepspeed.engine.checkpoints.checkpoint import CheckpointWriter
    from qa_deepspeed.engine.checkpoints.shard_writer import BackgroundTask

    rank = os.environ["RANK"]

    def mark(state: str, phase: str) -> None:
        if rank == "0":
            with open(f"{run}.marks", "a", encoding="utf-8") as file:
                file.write(f"{time.monotonic()} {state} {phase}\n")

    def note(owner: Any, function: str, phase: str) -> None:
        inner: Callable[..., Any] = getattr(owner, function)

        def noted(*arguments: Any, **named: Any) -> Any:
            mark("begin", phase)
            result = inner(*arguments, **named)
            mark("end", phase)
            return result

        setattr(owner, function, noted)

    steps = loop._steps

    def noted_steps(run_parts: Any, first_step: int) -> Iterator[Any]:
        with open(f"{run}.rows.{rank}", "a", encoding="utf-8") as file:
            for step, rows in steps(run_parts, first_step):
                tokens = zlib.crc32(run_parts.store.take(rows).input_ids.tobytes())
                entry = {"step": step, "questions": run_parts.ids_of_step(step), "tokens": tokens}
                file.write(json.dumps(entry) + "\n")
                file.flush()
                mark("begin", "training")
                yield step, rows
                mark("end", "training")

    loop._steps = noted_steps
    for owner, function, phase in (
        (trainer, "_features", "features"),
        (trainer, "_resume", "loading"),
        (CheckpointWriter, "save", "save"),
        (loop, "evaluate", "evaluation"),
        (trainer, "_save_verified", "export"),
        (trainer, "finish_run", "finishing"),
    ):
        note(owner, function, phase)
    start = BackgroundTask.start

    def noted_start(task: BackgroundTask, work: Callable[[], None]) -> None:
        def noted() -> None:
            mark("begin", "writing")
            work()
            mark("end", "writing")

        start(task, noted)

    BackgroundTask.start = noted_start  # type: ignore[method-assign]
    main(["train", *arguments])


def main() -> None:
    """Soak every stage and print what was seen."""
    if sys.argv[1:2] == ["--rank_of"]:
        return be_a_rank(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stages", nargs="+", default=list(STAGES))
    parser.add_argument("--phases", nargs="+", default=list(CYCLE), help="where one kill after another falls")
    arguments = parser.parse_args()
    os.environ.update(environment())  # one thread a rank: read when torch is imported
    import deepspeed  # noqa: F401  before the ranks are forked

    import qa_deepspeed.training.train  # noqa: F401

    folder = arguments.folder.resolve()
    if not (folder / "sample").exists():
        (folder / "sample").mkdir(parents=True)
        write_sample(folder / "sample", 7, 40, 6)
    chance = random.Random(arguments.seed)
    for place, stage in enumerate(arguments.stages):
        share = arguments.kills // len(arguments.stages) + (place < arguments.kills % len(arguments.stages))
        began = time.monotonic()
        found = soak(folder, stage, share, arguments.phases, chance)
        print(json.dumps(found | {"seconds": round(time.monotonic() - began)}), flush=True)


if __name__ == "__main__":
    main()
