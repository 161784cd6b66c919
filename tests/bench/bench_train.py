"""Training speed beside transformers.Trainer with equal clocks: the same model, questions, windows, precision, ranks.

    OMP_NUM_THREADS=1 python tests/bench/bench_train.py [--ranks 2] [--questions 960] [--rows 8] [--repeats 3] [--bf16]
        [--gpu]

One epoch over the same questions of en-v1-train.json with MiniLM-L6 at ZeRO-2, length 384, overlap 128, on CPUs, or
with --gpu a GPU a rank. `peer` pads every row to 384, as Trainer's example does; `peer tuned` pads to the longest row
of the batch and groups by length. The contestants take turns. `step_clock.py` notes the end of every optimizer step on
both sides: the first step and everything before it is start-up, a row of its own. The last step is left out, since
Trainer repeats rows to fill it. The others are compared by real tokens per second, and all take as many steps.
Set OMP_NUM_THREADS to cores / ranks.
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
from tests.distributed.launching import flags, free_port, run
from tests.paths import DATA, MINILM

TRAIN, DEV = DATA / "en-v1-train.json", DATA / "en-v1-dev.json"
RATE, LENGTH, OVERLAP = 1e-4, 384, 128
CONTESTANTS = ("ours", "peer tuned", "peer")
Measured = dict[str, float]


def command_line(who: str, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """The arguments of a contestant."""
    both = {
        "train_file": arguments.train_file,
        "output_dir": folder / who.replace(" ", "-"),
        "max_train_examples": arguments.questions,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "max_seq_length": arguments.length,
        "doc_stride": OVERLAP,
    }
    precision = ["--bf16"] * arguments.bf16
    if who == "ours":
        ours = {
            "model_name_or_path": arguments.model,
            "cache_dir": folder / "cache",
            "doc_stride_is": "overlap",
            "per_gpu_train_batch_size": arguments.rows,
            "deepspeed_config": arguments.config,
            "logging_steps": arguments.logging_steps,
            "cuda_graphs": arguments.cuda_graphs,
            "batch_layout": arguments.batch_layout,
            "save_steps": 0,
        }
        return ["train", *flags(**both, **ours), "--overwrite_output_dir", *precision]
    theirs = {
        "model": arguments.model,
        "predict_file": arguments.dev_file,
        "max_eval_examples": 8,
        "train_batch_size": arguments.rows,
    }
    if not arguments.peer_without_deepspeed:
        theirs["deepspeed_config"] = shipped()["zero2"]
    return [*flags(**both, **theirs), *["--tuned"] * (who == "peer tuned"), *precision]


def measure(who: str, folder: Path, arguments: argparse.Namespace) -> Measured:
    """One run of a contestant: seconds of start-up and of the steps after the first, their number and real tokens."""
    out = folder / "clock"
    launcher = ["deepspeed", "--num_accelerators", str(arguments.ranks), "--master_port", free_port()]
    script = [str(Path(__file__).with_name("step_clock.py")), who, str(out)]
    done = run([*launcher, *script, *command_line(who, folder, arguments)], folder, **arguments.environment)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((folder / f"clock.{rank}").read_text()) for rank in range(arguments.ranks)]
    return {
        "start": max(one["start"] for one in ranks),
        "seconds": max(sum(one["steps"][:-1]) for one in ranks),
        "steps": len(ranks[0]["steps"]) - 1,
        "tokens": sum(sum(one["tokens"][1:-1]) for one in ranks),
    }


def table(measured: dict[str, list[Measured]]) -> list[str]:
    """Medians of the turns; tokens a second are real tokens of the timed steps."""
    lines = [
        "| | start-up s | steps | real tokens | s, median | all turns | real tokens/s | ours is faster by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rates = {who: statistics.median(one["tokens"] / one["seconds"] for one in turns) for who, turns in measured.items()}
    for who, turns in measured.items():
        seconds = [one["seconds"] for one in turns]
        every = ", ".join(f"{value:.1f}" for value in seconds)
        faster = f"{rates['ours'] / rates[who]:.2f}" if "ours" in rates else ""
        lines.append(
            f"| {who} | {statistics.median(one['start'] for one in turns):.1f} | {turns[0]['steps']:.0f} | "
            f"{turns[0]['tokens']:,.0f} | "
            f"{statistics.median(seconds):.1f} | {every} | {rates[who]:,.0f} | {faster} |"
        )
    return lines


def environment_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Variables of the contestants' environment: threads of a rank, and its GPU."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // arguments.ranks))
    if not arguments.gpu:
        return {"OMP_NUM_THREADS": threads}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(arguments.ranks))))
    return {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": visible, "DS_ACCELERATOR": "cuda"}


def make_parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--questions", type=int, default=960)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step on each rank")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpu", action="store_true", help="train on GPUs")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only", choices=CONTESTANTS, action="append", help="these contestants only")
    parser.add_argument("--model", default=MINILM, help="folder of the model")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a window")
    parser.add_argument("--train_file", default=TRAIN)
    parser.add_argument("--dev_file", default=DEV)
    parser.add_argument("--config", default="zero2", help="our DeepSpeed config")
    parser.add_argument("--peer_without_deepspeed", action="store_true", help="Trainer on one device, by itself")
    parser.add_argument("--logging_steps", type=int, default=50, help="of ours")
    parser.add_argument("--batch_layout", default="auto", help="of ours")
    parser.add_argument("--cuda_graphs", default="auto", help="of ours")
    return parser


def main() -> None:
    """Run the contestants by turns and print a table."""
    arguments = make_parser().parse_args()
    arguments.environment = environment_of(arguments)
    threads = arguments.environment["OMP_NUM_THREADS"]
    measured: dict[str, list[Measured]] = {who: [] for who in arguments.only or CONTESTANTS}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(arguments.repeats):
            for who, turns in measured.items():
                turns.append(measure(who, Path(name), arguments))
    steps = {one["steps"] for turns in measured.values() for one in turns}
    assert len(steps) == 1, f"the contestants took different numbers of steps: {sorted(steps)}"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "deepspeed"))
    where = f"{torch.cuda.get_device_name()}, " if arguments.gpu else ""
    print(
        f"{where}{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}, {versions}; "
        f"{arguments.ranks} ranks x {threads} threads, {arguments.questions} questions, load {os.getloadavg()[0]:.1f}"
    )
    print("\n".join(table(measured)))


if __name__ == "__main__":
    main()
