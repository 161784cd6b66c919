"""Kill a run with SIGKILL at random moments, start it again by the same command, and compare it with an unbroken one.

    python tests/bench/soak.py --kills 50 --folder FOLDER

Every ZeRO stage gets its share of the kills, on two ranks with dropout, evaluation on the way and a checkpoint every
second step; moments are drawn over the whole length of a run, from the imports to the last file. At the end the model's
bytes must be those of the unbroken run, and so must the rows of every optimizer step, however often a step was taken.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qa_deepspeed.sample import write_sample
from tests.dist.launching import environment, flags, free_port
from tests.paths import REPOSITORY

STAGES = ("zero0", "zero1", "zero2", "zero3")
STEPS = 24
BUILT = "optimizer steps of"
"""What a run prints when its model is built."""
PHASES = (
    ("HasAns", "after an evaluation"),
    ("saved ", "after a save"),
    ("going on from", "after loading"),
    (BUILT, "after building the model"),
    ("train:", "after the features"),
)
"""What a run prints -> how far it had come."""


def options(folder: Path, stage: str, name: str) -> list[str]:
    """The flags of a run."""
    return flags(
        model_name_or_path=folder / "sample/model", train_file=folder / "sample/train.json",
        predict_file=folder / "sample/dev.json", cache_dir=folder / "cache", output_dir=folder / name,
        deepspeed_config=stage, version_2_with_negative=True, max_seq_length=160, doc_stride=64, learning_rate=1e-3,
        max_train_examples=100, max_steps=STEPS, logging_steps=6, save_steps=2, save_total_limit=2, do_eval=True,
        evaluate_during_training=True, per_gpu_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip


def start(folder: Path, stage: str, name: str) -> subprocess.Popen[bytes]:
    """Two ranks that write the rows of every step to FOLDER/NAME.rows.RANK and what they print to FOLDER/NAME.log."""
    command = ["torchrun", "--nproc_per_node", "2", "--master_port", free_port(), str(Path(__file__).resolve()),
               "--rank_of", str(folder / f"{name}.rows"), *options(folder, stage, name)]  # fmt: skip
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=log, stderr=log)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the launcher and all that it has started."""
    try:
        started = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        started = []
    for one in started:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(started, timeout=30)


def rows_of(folder: Path, name: str) -> dict[int, set[str]]:
    """Step -> the different lists of rows that it was ever taken with, as text, over both ranks."""
    found: dict[int, set[str]] = {}
    for path in folder.glob(f"{name}.rows.*"):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            found.setdefault(entry["step"], set()).add(json.dumps(entry["rows"]))
    return found


def phase(folder: Path, name: str, begin: int) -> str:
    """How far a run had come when it was killed, from what it printed since `begin`."""
    log = (folder / f"{name}.log").read_text(errors="replace")[begin:]
    for words, what in PHASES:
        if words in log:
            return what
    return "in imports and features"


def wait_until_built(process: subprocess.Popen[bytes], log: Path, begin: int) -> None:
    """Until the model is built or the process has ended: importing takes longer than training so little."""
    while process.poll() is None and not (log.exists() and BUILT in log.read_text(errors="replace")[begin:]):
        time.sleep(0.1)


def soak(folder: Path, stage: str, kills: int, chance: random.Random) -> dict[str, Any]:
    """The unbroken run, then the killed one; raises AssertionError where they differ.

    Every fourth moment is drawn over the whole run, the others over what comes after the model is built.
    """
    began = time.monotonic()
    whole = start(folder, stage, f"{stage}-whole")
    wait_until_built(whole, folder / f"{stage}-whole.log", 0)
    built = time.monotonic()
    assert whole.wait() == 0, f"see {stage}-whole.log"
    length, rest = time.monotonic() - began, time.monotonic() - built
    name, phases, leftovers = f"{stage}-killed", Counter[str](), 0
    log = folder / f"{name}.log"
    for number in range(kills):
        begin = len(log.read_text(errors="replace")) if log.exists() else 0
        process = start(folder, stage, name)
        if number % 4:
            wait_until_built(process, log, begin)
        try:
            process.wait(timeout=chance.uniform(0.1, rest if number % 4 else length))
        except subprocess.TimeoutExpired:
            kill(process)
            phases[phase(folder, name, begin)] += 1
            leftovers += bool(list((folder / name).glob("*.partial")))
        else:  # it came to its end before the moment: the next kills go to a new run
            assert process.returncode == 0, f"see {name}.log"
            compare(folder, f"{stage}-whole", name)
            shutil.rmtree(folder / name)
            phases["ended before its moment"] += 1
    assert start(folder, stage, name).wait() == 0, f"see {name}.log"
    compare(folder, f"{stage}-whole", name)
    return {"stage": stage, "kills": dict(phases), "inside a save": leftovers, "seconds of a run": round(length, 1)}


def compare(folder: Path, whole: str, killed: str) -> None:
    """The same bytes, and the same rows in every step."""
    ours, theirs = (folder / name / "model.safetensors" for name in (killed, whole))
    assert ours.read_bytes() == theirs.read_bytes(), f"{killed}: other weights"
    expected = rows_of(folder, whole)
    assert sorted(expected) == list(range(STEPS)) and all(len(rows) == 1 for rows in expected.values())
    assert rows_of(folder, killed) == expected, f"{killed}: other rows"


def be_a_rank(rows_file: str, arguments: list[str]) -> None:
    """Train, and write down which rows every step takes, with a checksum of their tokens."""
    import os

    import qa_deepspeed.train as trainer
    from qa_deepspeed.cli import main

    steps = trainer._steps

    def recorded(run: Any, first_step: int) -> Iterator[Any]:
        with open(f"{rows_file}.{os.environ['RANK']}", "a", encoding="utf-8") as file:
            for step, epoch, rows in steps(run, first_step):
                tokens = zlib.crc32(run.store.take(rows).input_ids.tobytes())
                entry = {"step": step, "rows": [*map(int, rows), tokens]}
                file.write(json.dumps(entry) + "\n")
                file.flush()
                yield step, epoch, rows

    trainer._steps = recorded
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
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if not (folder / "sample").exists():
        (folder / "sample").mkdir(parents=True)
        write_sample(folder / "sample", 7, 40, 6)
    chance = random.Random(arguments.seed)
    for place, stage in enumerate(arguments.stages):
        share = arguments.kills // len(arguments.stages) + (place < arguments.kills % len(arguments.stages))
        print(json.dumps(soak(folder, stage, share, chance)), flush=True)


if __name__ == "__main__":
    main()
