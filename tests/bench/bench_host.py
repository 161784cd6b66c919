"""The host's work in a training step: operators and milliseconds of forward, backward and update.

    python tests/bench/bench_host.py [--repeats 25] [--only zero2_bf16 bare_bf16] [--json]

The model is a deep, narrow BERT (24 layers, width 64, 391 tensors) whose arithmetic is negligible, so that milliseconds
on one CPU thread are dispatch and Python: what a GPU waits for where kernels are short. Our engine at ZeRO 0 to 3 in
three precisions stands beside a plain PyTorch loop (fused AdamW, clipping); all take turns of a step in one process.
Attention and dropout are torch's on both sides, as on a GPU, not those of models/attention/cpu_attention.py.
Operators are those of torch's profiler whose name begins with `aten::`, nested ones included. --json prints one line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForQuestionAnswering

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import ds_config
from qa_deepspeed.engine.device import choose_device
from qa_deepspeed.engine.engine import training_engine
from qa_deepspeed.engine.optim import parameter_groups
from qa_deepspeed.utils import dist

ROWS, LENGTH, VOCABULARY = 16, 32, 1000
WARM_UP = 4
PRECISIONS = ("fp32", "bf16", "autocast")
PHASES = ("forward", "backward", "update")
BARE = "bare"
STAGES = range(4)
SYSTEMS = tuple(f"{system}_{one}" for one in PRECISIONS for system in (BARE, *(f"zero{stage}" for stage in STAGES)))

Step = dict[str, Callable[[], Any]]
"""A step's phases by name, in order."""


def model() -> BertForQuestionAnswering:
    """The deep, narrow model, the same at each call."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=24,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    return BertForQuestionAnswering(config).train()


def rows() -> tuple[dict[str, Tensor], Tensor]:
    """Inputs `[rows, length]`, and a position to find in each row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    position = torch.randint(LENGTH, (ROWS,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, position


def loss_of(outputs: Any, position: Tensor) -> Tensor:
    """The mean cross-entropy of start and end, in float32."""
    start, end = (
        torch.nn.functional.cross_entropy(logits.float(), position)
        for logits in (outputs.start_logits, outputs.end_logits)
    )
    return (start + end) / 2


def bare(precision: str) -> Step:
    """A plain PyTorch loop."""
    plain = model().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    inputs, position = rows()
    optimizer = torch.optim.AdamW(parameter_groups(plain, 0.01), lr=1e-4, fused=True)
    held: dict[str, Tensor] = {}

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            outputs = plain(**inputs)
        held["loss"] = loss_of(outputs, position)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {"forward": forward, "backward": lambda: held["loss"].backward(), "update": update}


def ours(stage: int, precision: str) -> Step:
    """This package's engine."""
    options = RunOptions(
        output_dir="unused",
        model_name_or_path="unused",
        per_gpu_train_batch_size=ROWS,
        learning_rate=1e-4,
        weight_decay=0.01,
        bf16=precision == "bf16",
    )
    resolved = ds_config.resolve(options, 1, "cpu", True, f"zero{stage}")
    config = ds_config.finish(resolved, 1000, 64)
    if precision == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    with patch("qa_deepspeed.engine.engine.choose_attention"):
        engine = training_engine(model(), config, resolved, 1000, torch.device("cpu"))
    inputs, position = rows()
    held: dict[str, Tensor] = {}

    def forward() -> None:
        engine.begin_micro_batch(last=True)
        held["loss"] = loss_of(engine.train_forward(inputs), position)

    return {
        "forward": forward,
        "backward": lambda: engine.backward(held["loss"]),
        "update": lambda: engine.step(want_norm=False),
    }


def operators(step: Step) -> dict[str, int]:
    """The number of operators of each phase of a step."""
    counts = {}
    for phase, act in step.items():
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            act()
        counts[phase] = sum(event.count for event in profiled.key_averages() if event.key.startswith("aten::"))
    return counts


def measure(systems: dict[str, Step], repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """By system and phase: `ops`, and `ms`, the median of the turns."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(WARM_UP + repeats):
        for name, step in systems.items():
            for phase, act in step.items():
                began = time.perf_counter()
                act()
                if turn >= WARM_UP:
                    seconds.setdefault((name, phase), []).append(time.perf_counter() - began)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, step in systems.items():
        counts = operators(step)
        found[name] = {
            phase: {"ops": counts[phase], "ms": round(1000 * statistics.median(seconds[name, phase]), 2)}
            for phase in PHASES
        }
    return found


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Milliseconds and operators by phase, and the ratio of milliseconds to the plain loop's."""
    lines = [f"{'':16}{'forward':>18}{'backward':>18}{'update':>18}{'of the plain loop':>20}"]
    for name, phases in found.items():
        cells = "".join(f"{phases[phase]['ms']:9.1f} ms {phases[phase]['ops']:6,.0f}" for phase in PHASES)
        plain = found.get(f"{BARE}_{name.split('_')[1]}")
        total = sum(one["ms"] for one in phases.values())
        ratio = f"{total / sum(one['ms'] for one in plain.values()):20.2f}" if plain else ""
        lines.append(f"{name:16}{cells}{ratio}")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25, help="steps of each system that count")
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=SYSTEMS, metavar="SYSTEM")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    arguments = parser.parse_args()
    dist.ensure_rank_env()
    device = choose_device(no_cuda=True)
    dist.init(device, 600)
    torch.set_num_threads(1)
    systems = {}
    for name in arguments.only:
        system, precision = name.split("_")
        systems[name] = bare(precision) if system == BARE else ours(int(system[-1]), precision)
    found = measure(systems, arguments.repeats)
    print(json.dumps(found) if arguments.json else table(found))
    dist.destroy()


if __name__ == "__main__":
    main()
