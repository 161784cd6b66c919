"""The whole job beside transformers.Trainer with its defaults: features, training, evaluation and saving, by turns.

    OMP_NUM_THREADS=1 python tests/bench/bench_job.py [--ranks 2] [--questions 2000] [--seeds 42 1 2] [--scores_only]

MiniLM-L6, one epoch over the same questions of en-v1-train.json, 8 rows a rank, float32, ZeRO-2, scored on
en-v1-dev.json. Counted is the process from its start to its end, with nothing cached; F1 is that of the predictions by
the official rules, for both. `--scores_only FOLDER` compares the predictions.json that lie in FOLDER/ours-SEED and
FOLDER/peer-SEED already.
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
SYSTEMS = ("ours", "peer")


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
    }
    if system == "ours":
        options = flags(
            **both,
            model_name_or_path=MINILM,
            cache_dir=folder / "cache",
            deepspeed_config="zero2",
            per_gpu_train_batch_size=8,
            logging_steps=50,
            save_steps=0,
        )
        return by_deepspeed(arguments.ranks, "train", *options, "--do_eval")
    options = flags(**both, model=MINILM, train_batch_size=8, deepspeed_config=shipped()["zero2"])
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


def scores(folder: Path, seeds: list[int]) -> dict[str, np.ndarray]:
    """F1 of every question by system and seed, float64 `[seeds, questions]`."""
    gold = read_gold(str(DEV))
    found = {}
    for system in SYSTEMS:
        answers = [read_predictions(str(folder / f"{system}-{seed}" / "predictions.json")) for seed in seeds]
        found[system] = np.array(
            [
                [
                    score_answer(one[question.example_id], question.texts, gold.version_2, "en")[1]
                    for question in gold.questions
                ]
                for one in answers
            ]
        )
    return found


def report(folder: Path, seeds: list[int]) -> None:
    """Print F1 by seed, the means, and what chance would make of the difference."""
    gold = read_gold(str(DEV))
    f1 = scores(folder, seeds)
    for system in SYSTEMS:
        by_seed = ", ".join(f"{100 * value:.2f}" for value in f1[system].mean(axis=1))
        print(f"{system:5} F1 {100 * f1[system].mean():.2f} (seeds {seeds}: {by_seed})")
    paragraph = paragraph_numbers(gold, [question.example_id for question in gold.questions])
    paired = paired_difference(f1["peer"].mean(axis=0), f1["ours"].mean(axis=0), paragraph)
    low, high = (100 * limit for limit in paired.interval)
    print(
        f"ours - peer {100 * paired.difference:+.2f} points, 95% {low:+.2f} to {high:+.2f}, p {paired.p_value:.3f} "
        "(paired by question, paragraphs drawn, seeds averaged)"
    )


def main() -> None:
    """Run both systems by turns for every seed, then compare times and scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--scores_only", type=Path, metavar="FOLDER", help="compare what was predicted before")
    arguments = parser.parse_args()
    if arguments.scores_only:
        report(arguments.scores_only, arguments.seeds)
        return
    with tempfile.TemporaryDirectory() as name:
        seconds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
        for seed in arguments.seeds:
            for system in SYSTEMS:
                seconds[system].append(measured(system, Path(name) / f"{system}-{seed}", seed, arguments))
                print(json.dumps({"system": system, "seed": seed, "seconds": seconds[system][-1]}), flush=True)
        ours, peer = (statistics.median(seconds[system]) for system in SYSTEMS)
        print(
            f"ours {ours:.0f} s, peer {peer:.0f} s: {peer / ours:.2f} times as fast (medians of {len(seconds['ours'])})"
        )
        report(Path(name), arguments.seeds)


if __name__ == "__main__":
    main()
