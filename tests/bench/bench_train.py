"""Training speed beside transformers.Trainer, by turns in one run: the same model, questions, precision and ranks.

    OMP_NUM_THREADS=1 python tests/bench/bench_train.py [--ranks 2] [--questions 192] [--rows 8] [--repeats 3] [--bf16]
        [--gpu]

One epoch over the same questions of en-v1-train.json with MiniLM-L6 at ZeRO-2, length 384, so that both work on the
same real tokens; on CPUs, or with --gpu a GPU a rank. `peer` pads every row to 384, as Trainer's example does; `peer
tuned` pads to the longest row and groups by length. Counted is the training alone, as each says it, its first step
included; medians of the repeats. Set OMP_NUM_THREADS to cores / ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from qa_deepspeed.engine.ds_config import shipped
from tests.distributed.launching import by_deepspeed, flags, free_port, run
from tests.paths import DATA, MINILM, SHARED

TRAIN, DEV = DATA / "en-v1-train.json", DATA / "en-v1-dev.json"
RATE, LENGTH = 1e-4, 384


def ours(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of training, and real tokens a second, of this package."""
    options = flags(
        model_name_or_path=MINILM,
        train_file=TRAIN,
        output_dir=folder / "ours",
        cache_dir=folder / "cache",
        max_train_examples=arguments.questions,
        num_train_epochs=1,
        per_gpu_train_batch_size=arguments.rows,
        learning_rate=RATE,
        max_seq_length=LENGTH,
        deepspeed_config="zero2",
        logging_steps=10**6,
        save_steps=0,
        bf16=arguments.bf16,
        overwrite_output_dir=True,
    )
    done = run(by_deepspeed(arguments.ranks, "train", *options), folder, **arguments.environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "ours/metrics.jsonl").read_text().splitlines()]
    seconds = json.loads((folder / "ours/run.json").read_text())["seconds"]["training"]
    return {"seconds": seconds, "tokens": lines[-1]["speed/tokens_per_second"] * seconds}


def peer(folder: Path, arguments: argparse.Namespace, tuned: bool) -> dict[str, float]:
    """Seconds of training of the peer."""
    options = flags(
        model=MINILM,
        train_file=TRAIN,
        predict_file=DEV,
        output_dir=folder / "peer",
        max_eval_examples=8,
        max_train_examples=arguments.questions,
        num_train_epochs=1,
        train_batch_size=arguments.rows,
        learning_rate=RATE,
        max_seq_length=LENGTH,
        deepspeed_config=shipped()["zero2"],
    )
    options += ["--tuned"] * tuned + ["--bf16"] * arguments.bf16
    launcher = ["deepspeed", "--num_accelerators", str(arguments.ranks), "--master_port", free_port()]
    script = str(SHARED / "peers" / "hf_trainer_qa.py")
    done = run([*launcher, script, *options], folder, **arguments.environment)
    assert done.returncode == 0, done.stderr[-3000:]
    measured_once = next(line for line in done.stdout.splitlines() if line.startswith('{"system"'))
    return {"seconds": json.loads(measured_once)["train_s"]}


def main() -> None:
    """Run the contestants by turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--questions", type=int, default=192)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step on each rank")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpu", action="store_true", help="train on GPUs")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only", choices=("ours", "peer tuned", "peer"), help="one contestant")
    arguments = parser.parse_args()
    arguments.threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // arguments.ranks))
    arguments.environment = {"OMP_NUM_THREADS": arguments.threads}
    if arguments.gpu:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(arguments.ranks))))
        arguments.environment |= {"CUDA_VISIBLE_DEVICES": visible, "DS_ACCELERATOR": "cuda"}
    contestants = {
        "ours": lambda folder: ours(folder, arguments),
        "peer tuned": lambda folder: peer(folder, arguments, tuned=True),
        "peer": lambda folder: peer(folder, arguments, tuned=False),
    }
    if arguments.only:
        contestants = {arguments.only: contestants[arguments.only]}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    tokens = 0.0
    with tempfile.TemporaryDirectory() as name:
        for _ in range(arguments.repeats):
            for contestant, measure in contestants.items():
                measured_once = measure(Path(name))
                seconds[contestant].append(measured_once["seconds"])
                tokens = measured_once.get("tokens", tokens)
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "deepspeed"))
    where = f"{torch.cuda.get_device_name()}, " if arguments.gpu else ""
    print(
        f"{where}{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}, {versions}; "
        f"{arguments.ranks} ranks x {arguments.threads} threads, load {os.getloadavg()[0]:.1f}"
    )
    print("| what | training s (median) | all | real tokens/s | ours is faster by |\n|---|---|---|---|---|")
    for contestant, measured in seconds.items():
        median = statistics.median(measured)
        ratio = f"{median / statistics.median(seconds['ours']):.2f}" if "ours" in seconds else ""
        every = ", ".join(f"{value:.1f}" for value in measured)
        print(f"| {contestant} | {median:.1f} | {every} | {tokens / median:,.0f} | {ratio} |")


if __name__ == "__main__":
    main()
