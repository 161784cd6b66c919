"""A student of some layers with and without its teacher: F1 by seed, and what the teacher costs in time.

    OMP_NUM_THREADS=1 python tests/bench/bench_distill.py [--questions N] [--eval_questions N] [--seeds 42 1 2]
        [--layers 0,2,4] [--weight 0.9] [--temperature 2] [--epochs 3] [--ranks 2] [--gpu] [--bf16] [--folder RUNS]

The teacher is MiniLM-L6 trained on en-v1-train.json (`--teacher FOLDER` takes a trained one); both students start from
the same layers of it and train on the same questions in the same order, by turns, a turn for each seed; scored on
en-v1-dev.json. Steps/s are the median over the log lines. With `--folder` runs that have finished are kept and not
repeated, so that an interrupted benchmark continues. `--questions` draws others for each seed, so that the logits are
computed for each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from qa_deepspeed.qa.metrics.compare import paragraph_numbers
from qa_deepspeed.qa.metrics.prediction_files import read_gold, read_predictions
from qa_deepspeed.qa.metrics.significance import paired_difference
from qa_deepspeed.qa.metrics.squad import score_answer
from tests.distributed import launching
from tests.paths import DATA, MINILM

TRAIN, DEV = DATA / "en-v1-train.json", DATA / "en-v1-dev.json"
STUDENTS = ("without", "with")


def train(folder: Path, arguments: argparse.Namespace, **options: object) -> dict[str, Any]:
    """Train and evaluate into `folder`, unless that has been done; returns run.json."""
    both = {
        "train_file": TRAIN,
        "predict_file": DEV,
        "output_dir": folder,
        "cache_dir": arguments.folder / "cache",
        "max_seq_length": arguments.length,
        "doc_stride": 128,
        "doc_stride_is": "overlap",
        "num_train_epochs": arguments.epochs,
        "learning_rate": arguments.rate,
        "per_gpu_train_batch_size": arguments.rows,
        "per_gpu_eval_batch_size": 16,
        "logging_steps": arguments.logging_steps,
        "save_steps": 0,
        "deepspeed_config": arguments.config,
    }
    for name, value in (("max_train_examples", arguments.questions), ("max_eval_examples", arguments.eval_questions)):
        if value:
            both[name] = value
    command = ["train", *launching.flags(**{**both, **options}), "--do_eval", *["--bf16"] * arguments.bf16]
    start = launching.by_deepspeed(arguments.ranks, *command) if arguments.ranks > 1 else launching.alone(*command)
    done = subprocess.run(
        start,
        cwd=arguments.folder,
        capture_output=True,
        text=True,
        env=launching.environment(**arguments.environment),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return record


def students(teacher: Path, seed: int, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The students of a seed by name: run.json, and the steps/s of the log lines."""
    start = {"model_name_or_path": teacher, "student_layers": arguments.layers, "seed": seed}
    teaching = {
        "teacher_model_name_or_path": teacher,
        "distillation_weight": arguments.weight,
        "distillation_temperature": arguments.temperature,
    }
    found = {}
    for name in STUDENTS:
        folder = arguments.folder / f"{name}-{seed}"
        record = train(folder, arguments, **start, **(teaching if name == "with" else {}))
        rates = launching.logged(folder, "speed/questions_per_second") / record["identity"]["global_batch_size"]
        found[name] = {**record, "steps_per_second": float(np.median(rates))}
        print(json.dumps({"student": name, "seed": seed, "f1": record["metrics"]["f1"]}), flush=True)
    return found


def f1_of_questions(folder: Path) -> tuple[list[str], np.ndarray]:
    """Ids of the answered questions, and the F1 of each, float64 `[questions]`."""
    gold, answers = read_gold(str(DEV)), read_predictions(str(folder / "predictions.json"))
    asked = [question for question in gold.questions if question.example_id in answers]
    scores = [score_answer(answers[one.example_id], one.texts, gold.version_2, "en")[1] for one in asked]
    return [one.example_id for one in asked], np.array(scores)


def table(seeds: list[int], turns: list[dict[str, dict[str, Any]]]) -> list[str]:
    """EM and F1 by seed with their means, and steps/s."""
    lines = [
        f"| student | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | steps/s |",
        "|---" * (len(seeds) + 3) + "|",
    ]
    for name in STUDENTS:
        scores = [(turn[name]["metrics"]["exact"], turn[name]["metrics"]["f1"]) for turn in turns]
        means = tuple(statistics.mean(column) for column in zip(*scores, strict=True))
        cells = [f"{exact:.1f} / {f1:.1f}" for exact, f1 in (*scores, means)]
        rate = statistics.median(turn[name]["steps_per_second"] for turn in turns)
        lines.append(f"| {name} teacher | {' | '.join(cells)} | {rate:.3f} |")
    return lines


def differences(folder: Path, seeds: list[int], turns: list[dict[str, dict[str, Any]]]) -> list[str]:
    """F1 with less F1 without: over the seeds, and over the questions."""
    gains = [turn["with"]["metrics"]["f1"] - turn["without"]["metrics"]["f1"] for turn in turns]
    lines = []
    if len(gains) > 1:
        error = statistics.stdev(gains) / len(gains) ** 0.5
        lines.append(f"with - without: {statistics.mean(gains):+.2f} points of F1, standard error {error:.2f} (seeds)")
    scored = {name: [f1_of_questions(folder / f"{name}-{seed}") for seed in seeds] for name in STUDENTS}
    ids = scored["with"][0][0]
    means = {name: np.mean([scores for _, scores in found], axis=0) for name, found in scored.items()}
    paired = paired_difference(means["without"], means["with"], paragraph_numbers(read_gold(str(DEV)), ids))
    low, high = (100 * limit for limit in paired.interval)
    lines.append(
        f"with - without: {100 * paired.difference:+.2f} points, 95% {low:+.2f} to {high:+.2f}, p {paired.p_value:.3f} "
        "(paired by question, paragraphs drawn, seeds averaged)"
    )
    return lines


def make_parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, help="train on so many questions; left out, on all")
    parser.add_argument("--eval_questions", type=int, help="score on so many questions; left out, on all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--layers", default="0,2,4", help="layers of the teacher that a student starts from")
    parser.add_argument("--weight", type=float, default=0.9)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step on each rank")
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--logging_steps", type=int, default=10)
    parser.add_argument("--config", default="zero2")
    parser.add_argument("--model", default=MINILM, help="what the teacher starts from")
    parser.add_argument("--teacher", type=Path, help="a trained teacher")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    return parser


def measure(arguments: argparse.Namespace) -> None:
    """Train all and print the table."""
    teacher = arguments.teacher
    if teacher is None:
        teacher = arguments.folder / "teacher"
        record = train(teacher, arguments, model_name_or_path=arguments.model)
        print(f"teacher: EM {record['metrics']['exact']:.1f}, F1 {record['metrics']['f1']:.1f}", flush=True)
    turns = [students(teacher.resolve(), seed, arguments) for seed in arguments.seeds]
    print("\n".join([*table(arguments.seeds, turns), *differences(arguments.folder, arguments.seeds, turns)]))
    seconds = [turn["with"]["seconds"]["teachers"] for turn in turns]
    print(f"logits of the teacher: {seconds[0]:.1f} s once, then {', '.join(f'{one:.2f}' for one in seconds[1:])} s")


def main() -> None:
    """Run the benchmark in its folder, or in a temporary one."""
    arguments = make_parser().parse_args()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // arguments.ranks))
    arguments.environment = {"OMP_NUM_THREADS": threads}
    if arguments.gpu:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(arguments.ranks))))
        arguments.environment |= {"CUDA_VISIBLE_DEVICES": visible, "DS_ACCELERATOR": "cuda"}
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "deepspeed"))
    where = f"{torch.cuda.get_device_name()}, " if arguments.gpu else ""
    print(
        f"{where}{os.cpu_count()} cores {platform.machine()}, {versions}; {arguments.ranks} ranks x {threads} threads"
    )
    if arguments.folder is not None:
        arguments.folder = arguments.folder.resolve()
        arguments.folder.mkdir(parents=True, exist_ok=True)
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as name:
        arguments.folder = Path(name)
        measure(arguments)


if __name__ == "__main__":
    main()
