"""The whole job beside transformers.Trainer: features, training, evaluation and prediction files, by turns.

    OMP_NUM_THREADS=1 python tests/bench/bench_job.py [--ranks 2] [--questions 2000] [--eval_questions N]
        [--seeds 42 1 2] [--only ours --only "peer tuned"] [--scores_only FOLDER]

MiniLM-L6, one epoch over as many questions of en-v1-train.json, 8 rows a rank, float32, ZeRO-2, windows of 384 tokens
that overlap by 128, scored on en-v1-dev.json in batches of 16. `peer` is Trainer with its defaults (every row padded to
384), `peer tuned` pads to the longest row of the batch and groups by length. A seed is a turn of all; a ratio is the
median of the turns' ratios. Counted is the process from its start to its end, with nothing cached. Ours also saves the
model, loads it again to check it and writes the report, which the peers leave out. F1 is that of the predictions by the
official rules, for all. `--scores_only FOLDER` compares the predictions.json that lie in FOLDER/SYSTEM-SEED already
(FOLDER/ours-42, FOLDER/peer-tuned-42, ...).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from qa_deepspeed.engine.ds_config import shipped
from qa_deepspeed.qa.metrics.compare import paragraph_numbers
from qa_deepspeed.qa.metrics.prediction_files import read_gold, read_predictions
from qa_deepspeed.qa.metrics.significance import paired_difference
from qa_deepspeed.qa.metrics.squad import score_answer
from tests.distributed.launching import by_deepspeed, environment, flags, free_port
from tests.paths import DATA, MINILM, SHARED

TRAIN, DEV = DATA / "en-v1-train.json", DATA / "en-v1-dev.json"
SYSTEMS = ("ours", "peer tuned", "peer")


def command(system: str, folder: Path, seed: int, arguments: argparse.Namespace) -> list[str]:
    """What starts the job of a system with its output in `folder`."""
    both = {
        "train_file": TRAIN,
        "predict_file": DEV,
        "output_dir": folder,
        "num_train_epochs": 1,
        "seed": seed,
        "max_train_examples": arguments.questions,
        "learning_rate": 1e-4,
        "max_seq_length": 384,
        "doc_stride": 128,
    }
    if arguments.eval_questions:
        both["max_eval_examples"] = arguments.eval_questions
    if system == "ours":
        options = flags(
            **both,
            model_name_or_path=MINILM,
            cache_dir=folder / "cache",
            deepspeed_config="zero2",
            doc_stride_is="overlap",
            per_gpu_train_batch_size=8,
            per_gpu_eval_batch_size=16,
            logging_steps=50,
            save_steps=0,
        )
        return by_deepspeed(arguments.ranks, "train", *options, "--do_eval")
    options = flags(**both, model=MINILM, train_batch_size=8, eval_batch_size=16, deepspeed_config=shipped()["zero2"])
    options += ["--tuned"] * (system == "peer tuned")
    launcher = ["deepspeed", "--num_accelerators", str(arguments.ranks), "--master_port", free_port()]
    return [*launcher, str(SHARED / "peers" / "hf_trainer_qa.py"), *options]


def measured(system: str, folder: Path, seed: int, arguments: argparse.Namespace) -> float:
    """Seconds that the job takes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.perf_counter()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // arguments.ranks))
    done = subprocess.run(
        command(system, folder, seed, arguments),
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment(OMP_NUM_THREADS=threads),
    )
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stderr[-3000:]
    return seconds


def place(folder: Path, system: str, seed: int) -> Path:
    """The output folder of one job."""
    return folder / f"{system.replace(' ', '-')}-{seed}"


def scores(folder: Path, systems: list[str], seeds: list[int]) -> tuple[list[str], dict[str, np.ndarray]]:
    """The ids of the questions that were answered, and their F1 by system and seed, float64 `[seeds, questions]`."""
    gold = read_gold(str(DEV))
    answers = {
        system: [read_predictions(str(place(folder, system, seed) / "predictions.json")) for seed in seeds]
        for system in systems
    }
    answered = {frozenset(one) for of_seeds in answers.values() for one in of_seeds}
    assert len(answered) == 1, "all answered the same questions"
    questions = [question for question in gold.questions if question.example_id in next(iter(answered))]
    f1 = {
        system: np.array(
            [
                [
                    score_answer(one[question.example_id], question.texts, gold.version_2, "en")[1]
                    for question in questions
                ]
                for one in of_seeds
            ]
        )
        for system, of_seeds in answers.items()
    }
    return [question.example_id for question in questions], f1


def report(folder: Path, systems: list[str], seeds: list[int]) -> None:
    """Print F1 by seed, the means, and what chance would make of the differences."""
    ids, f1 = scores(folder, systems, seeds)
    for system in systems:
        by_seed = ", ".join(f"{100 * value:.2f}" for value in f1[system].mean(axis=1))
        print(f"{system:10} F1 {100 * f1[system].mean():.2f} (seeds {seeds}: {by_seed})")
    paragraph = paragraph_numbers(read_gold(str(DEV)), ids)
    for system in systems[1:]:
        paired = paired_difference(f1[system].mean(axis=0), f1[systems[0]].mean(axis=0), paragraph)
        low, high = (100 * limit for limit in paired.interval)
        print(
            f"{systems[0]} - {system} {100 * paired.difference:+.2f} points, 95% {low:+.2f} to {high:+.2f}, "
            f"p {paired.p_value:.3f} (paired by question, paragraphs drawn, seeds averaged)"
        )


def table(seconds: dict[str, list[float]]) -> list[str]:
    """Lines of a table: seconds of every turn, and how many times as fast the first system is."""
    first = next(iter(seconds))
    lines = [f"| | seconds, by turns | {first} is faster by |", "|---|---|---|"]
    for system, turns in seconds.items():
        faster = statistics.median(own / ours for own, ours in zip(turns, seconds[first], strict=True))
        lines.append(f"| {system} | {', '.join(f'{one:.0f}' for one in turns)} | {faster:.2f} |")
    return lines


def main() -> None:
    """Run the systems by turns, a turn for every seed, then compare times and scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--eval_questions", type=int, help="evaluate on the first so many questions only")
    parser.add_argument("--only", choices=SYSTEMS, action="append", help="these systems only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--scores_only", type=Path, metavar="FOLDER", help="compare what was predicted before")
    arguments = parser.parse_args()
    systems = [system for system in SYSTEMS if system in (arguments.only or SYSTEMS)]
    if arguments.scores_only:
        report(arguments.scores_only, systems, arguments.seeds)
        return
    with tempfile.TemporaryDirectory() as name:
        seconds: dict[str, list[float]] = {system: [] for system in systems}
        for seed in arguments.seeds:
            for system in systems:
                seconds[system].append(measured(system, place(Path(name), system, seed), seed, arguments))
                print(json.dumps({"system": system, "seed": seed, "seconds": seconds[system][-1]}), flush=True)
        print("\n".join(table(seconds)))
        report(Path(name), systems, arguments.seeds)


if __name__ == "__main__":
    main()
