"""Scaling of two ranks at ZeRO-2: against two single runs at the same time, each process on its own core.

    python tests/bench/bench_ranks.py [--turns N] [--config NAME]

Two ranks that share global batches of 16 rows and two single runs with batches of 8, on the halves of the same
questions, take turns of a few optimizer steps: one pair waits while the other works, so that both see the same
variation of the machine. Whole runs one after another, two minutes each, varied by a quarter.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from bench_engine import ROWS, STEPS, TRAIN, prepared

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.device import choose_device
from qa_deepspeed.engine.engine import training_engine
from qa_deepspeed.models.facts import model_facts
from qa_deepspeed.models.heads import head_of
from qa_deepspeed.qa.features.batching import make_batch
from qa_deepspeed.qa.features.sampler import epoch_order, micro_batches
from qa_deepspeed.training.features import load_features
from qa_deepspeed.utils import dist
from tests.distributed.launching import free_port
from tests.paths import MINILM

QUESTIONS, STEPS_A_TURN = 2000, 3


@dataclass(frozen=True)
class Place:
    """Where a process stands: its rank in its run, and which part of the questions that run trains on."""

    rank: int
    world_size: int
    part: int
    parts: int
    core: int
    port: str


def train_by_turns(place: Place, config: str, folder: str, turns: Connection) -> None:
    """Take the requested number of optimizer steps and report real tokens and seconds, until 0 is requested."""
    os.sched_setaffinity(0, {place.core})
    os.environ.update(
        RANK=str(place.rank),
        LOCAL_RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_WORLD_SIZE=str(place.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=place.port,
    )
    device = choose_device(no_cuda=True)
    resolved, finished, store, layout, (model,) = prepared(run_options(config, folder), device)
    engine = training_engine(model, finished, resolved, STEPS, device)
    head = head_of(model, False)
    engine.module.train()
    mine = np.arange(place.part, len(store), place.parts)
    order = epoch_order(store.lengths[mine], ROWS * place.world_size, 42, 0)
    step = 0
    while steps := turns.recv():
        tokens, began = 0, time.perf_counter()
        for _ in range(steps):
            rows = micro_batches(mine[order[step % len(order)]], place.rank, place.world_size, 1)[0]
            batch = make_batch(store.take, rows, layout)
            engine.begin_micro_batch(last=True)
            loss = head.losses(engine.train_forward(head.training_inputs(batch)), batch).mean()
            engine.backward(loss)
            engine.step(want_norm=False)
            tokens += batch.tokens
            step += 1
        turns.send((tokens, time.perf_counter() - began))
    dist.destroy()


def run_options(config: str, folder: str) -> RunOptions:
    """The options of all four processes, as `train` would have them."""
    return RunOptions(
        model_name_or_path=str(MINILM),
        train_file=str(TRAIN),
        output_dir=folder,
        cache_dir=folder,
        max_train_examples=QUESTIONS,
        deepspeed_config=config,
        learning_rate=1e-4,
        per_gpu_train_batch_size=ROWS,
    )


def speed(pair: list[Connection]) -> float:
    """Real tokens a second of two processes together over a turn."""
    for turns in pair:
        turns.send(STEPS_A_TURN)
    return sum(tokens / seconds for tokens, seconds in [turns.recv() for turns in pair])


def main() -> None:
    """Start four processes, let the pairs take turns, print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20, help=f"of {STEPS_A_TURN} optimizer steps of each pair")
    parser.add_argument("--config", default="zero2", help="the ds_config (zero2)")
    arguments = parser.parse_args()
    spawn = get_context("spawn")
    cores = sorted(os.sched_getaffinity(0))[:2]
    with tempfile.TemporaryDirectory() as folder:
        options = run_options(arguments.config, folder)
        load_features(options, "train", model_facts(options))  # built once, for all
        port = free_port()
        places = [Place(rank, 2, 0, 1, cores[rank], port) for rank in (0, 1)]
        places += [Place(0, 1, part, 2, cores[part], free_port()) for part in (0, 1)]
        ends = [spawn.Pipe() for _ in places]
        workers = [
            spawn.Process(target=train_by_turns, args=(place, arguments.config, folder, end), daemon=True)
            for place, (_, end) in zip(places, ends, strict=True)
        ]
        for worker in workers:
            worker.start()
        pipes = [mine for mine, _ in ends]
        together, apart = [], []
        for turn in range(arguments.turns + 1):
            first, second = speed(pipes[:2]), speed(pipes[2:])
            if turn:  # the first warms up
                together.append(first)
                apart.append(second)
        for turns in pipes:
            turns.send(0)
        for worker in workers:
            worker.join()
    ratios = [one / other for one, other in zip(together, apart, strict=True)]
    print(f"torch {torch.__version__}, {arguments.config}, {arguments.turns} turns of {STEPS_A_TURN} steps")
    print(f"two ranks             {statistics.median(together):8,.0f} real tokens/s")
    print(f"two single runs, summed {statistics.median(apart):8,.0f} real tokens/s")
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"ratio                 {middle:8.3f} (median of the turns' ratios; quartiles {low:.2f}, {high:.2f})")


if __name__ == "__main__":
    main()
