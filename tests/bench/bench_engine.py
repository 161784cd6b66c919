"""What DeepSpeed costs, and how much of the device a training step uses.

    OMP_NUM_THREADS=1 python tests/bench/bench_engine.py overhead|attention|compiled [--repeats N]
    torchrun --nproc_per_node 2 tests/bench/bench_engine.py gather [--repeats N]

overhead: a ZeRO-0 step of the engine beside a loop written by hand (forward, backward, clipping, the same fused AdamW
    and schedule) over the same batches, by turns in one process.
attention: forward and backward of a BERT-base-shaped model, dropout active, with this package's attention and dropout
    and with Transformers' default (sdpa), by turns; the ratio of the measured matrix throughput that the model's
    own operations (no padding, nothing computed twice) come to.
compiled: forward and backward of MiniLM on batches of several lengths, dropout active, as trained here, by
    Transformers' default and by that compiled (`torch.compile(dynamic=True)`, needs a compiler), by turns.
gather: MiniLM's parameters from all ranks of one host to all, by gloo's all-gather and by broadcasts, by turns.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering, get_scheduler

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import ds_config
from qa_deepspeed.engine.device import choose_device, keep_freed_memory
from qa_deepspeed.engine.ds_config import ResolvedConfig
from qa_deepspeed.engine.engine import training_engine
from qa_deepspeed.engine.flops import measured_peak_flops, training_flops
from qa_deepspeed.engine.optim import default_optimizer
from qa_deepspeed.models.attention.row_attention import speed_up_on_cpu
from qa_deepspeed.models.facts import model_facts
from qa_deepspeed.models.heads import Head, head_of
from qa_deepspeed.models.loading import load_model
from qa_deepspeed.qa.features.batching import Batch, Layout, make_batch
from qa_deepspeed.qa.features.families import model_columns
from qa_deepspeed.qa.features.sampler import epoch_order
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.training.features import load_features
from qa_deepspeed.utils import dist
from tests.paths import DATA, MINILM

TRAIN = DATA / "en-v1-train.json"
ROWS, QUESTIONS = 8, 192
STEPS = 1000  # that the learning rate is planned for
BERT_BASE = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}


def in_turn(ways: Mapping[str, Callable[[int], None]], turns: int) -> dict[str, list[float]]:
    """Seconds of every turn of every way; the first turn of each warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way(turn)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def mean_loss(head: Head, outputs: Any, batch: Batch) -> torch.Tensor:
    """The loss of a micro-batch that is a whole global batch."""
    return (head.losses(outputs, batch) * batch.weight).mean()


def prepared(
    options: RunOptions, device: torch.device, models: int = 1
) -> tuple[ResolvedConfig, dict[str, Any], FeatureStore, Layout, list[Any]]:
    """What `train` would train on and with, the ranks having met: the options resolved, DeepSpeed's config, features,
    their layout, and as many models."""
    resolved = ds_config.resolve(options, dist.world_size(), "cpu", True, options.deepspeed_config)
    facts = model_facts(resolved.options)
    store = load_features(resolved.options, "train", facts)
    dist.init(device, options.timeout)
    loaded = [load_model(resolved.options, facts.config)[0] for _ in range(models)]
    layout = facts.layout(model_columns(loaded[0], facts.config), 0)
    return resolved, ds_config.finish(resolved, STEPS, ds_config.hidden_size(facts.config)), store, layout, loaded


def overhead(repeats: int) -> None:
    """Print the ratio of a step of the engine to one of the loop by hand."""
    dist.ensure_rank_env()
    device = choose_device(no_cuda=True)
    with tempfile.TemporaryDirectory() as folder:
        options = RunOptions(
            model_name_or_path=str(MINILM),
            train_file=str(TRAIN),
            output_dir=folder,
            cache_dir=folder,
            max_train_examples=QUESTIONS,
            deepspeed_config="zero0",
            learning_rate=1e-4,
        )
        resolved, config, store, layout, models = prepared(options, device, models=2)
        batches = [make_batch(store.take, rows, layout) for rows in epoch_order(store.lengths, ROWS, 42, 0)]
        engine = training_engine(models[0], config, resolved, STEPS, device)
        plain = models[1]
        speed_up_on_cpu(plain)
        optimizer = default_optimizer(plain, resolved.options)
        schedule = get_scheduler("linear", optimizer, 0, STEPS)
        heads = [head_of(model, False) for model in models]
        for model in models:
            model.train()

        def by_engine(turn: int) -> None:
            batch = batches[turn % len(batches)]
            engine.begin_micro_batch(last=True)
            engine.backward(mean_loss(heads[0], engine.train_forward(heads[0].training_inputs(batch)), batch))
            engine.step(want_norm=False)

        def by_hand(turn: int) -> None:
            batch = batches[turn % len(batches)]
            mean_loss(heads[1], plain(**heads[1].training_inputs(batch)), batch).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), options.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

        seconds = in_turn({"engine, ZeRO-0": by_engine, "by hand": by_hand}, repeats)
        dist.destroy()
    ratios = [one / other for one, other in zip(*seconds.values(), strict=True)]
    for name, measured in seconds.items():
        print(f"{name:16} {1000 * statistics.median(measured):8.1f} ms a step (median of {repeats})")
    print(f"engine / by hand {statistics.median(ratios):8.3f} (median of the steps' ratios)")


def like_length(length: int) -> dict[str, torch.Tensor]:
    """Rows of nearly one length, as in batches of similar length: up to 7 tokens shorter than `length`."""
    generator = np.random.default_rng(0)
    real = length - generator.integers(0, 8, ROWS)
    ids = torch.from_numpy(generator.integers(1000, 30000, (ROWS, length)))
    mask = (torch.arange(length) < torch.from_numpy(real)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}


def attention(repeats: int) -> None:
    """Print the time of a step and its MFU, with this package's attention and with the default."""
    torch.manual_seed(0)
    # a configuration for each: the choice of attention is kept there
    configs = {name: AutoConfig.for_model("bert", **BERT_BASE) for name in ("ours", "default")}
    models = {name: AutoModelForQuestionAnswering.from_config(config) for name, config in configs.items()}
    speed_up_on_cpu(models["ours"])
    keep_freed_memory()  # of both
    for model in models.values():
        model.train()
    print("| length | ours s | default s | default / ours | ours, MFU | default, MFU |\n" + "|---" * 6 + "|")
    for length in (192, 384):
        inputs = like_length(length)
        lengths = inputs["attention_mask"].sum(dim=1).double()
        per_token, per_pair = training_flops(models["ours"], configs["ours"])
        operations = float(per_token * lengths.sum() + per_pair * (lengths**2).sum())
        peaks: list[float] = []

        def step(model: Any, inputs: dict[str, torch.Tensor] = inputs) -> None:
            outputs = model(**inputs)
            (outputs.start_logits.float().logsumexp(1) + outputs.end_logits.float().logsumexp(1)).mean().backward()
            model.zero_grad()

        ways = {name: lambda turn, model=model, step=step: step(model) for name, model in models.items()}
        # the peak is measured between the turns: a virtual core's speed changes while they last
        ways["peak"] = lambda turn, peaks=peaks: peaks.append(measured_peak_flops(torch.device("cpu"), torch.float32))
        seconds = in_turn(ways, repeats)
        ours, default = (statistics.median(seconds[name]) for name in ("ours", "default"))
        ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["default"], strict=True))
        shares = [
            statistics.median(operations / one / peak for one, peak in zip(seconds[name], peaks[1:], strict=True))
            for name in ("ours", "default")
        ]
        print(f"| {length} | {ours:.2f} | {default:.2f} | {ratio:.2f} | {shares[0]:.0%} | {shares[1]:.0%} |")


def compiled(repeats: int) -> None:
    """Print what compiling takes and gives over lengths that change from step to step."""
    names = ("ours", "default", "compiled")
    models = {name: AutoModelForQuestionAnswering.from_pretrained(MINILM) for name in names}
    speed_up_on_cpu(models["ours"])
    keep_freed_memory()
    for model in models.values():
        model.train()
    models["compiled"].compile(dynamic=True)
    batches = [like_length(length) for length in (96, 144, 192, 264, 384)]

    def step(model: Any, turn: int) -> None:
        outputs = model(**batches[turn % len(batches)])
        (outputs.start_logits.logsumexp(1) + outputs.end_logits.logsumexp(1)).mean().backward()
        model.zero_grad()

    began = time.perf_counter()
    for turn in range(len(batches)):
        step(models["compiled"], turn)
    print(f"compiling, and the first {len(batches)} steps: {time.perf_counter() - began:.0f} s")
    ways = {name: functools.partial(step, models[name]) for name in names}
    seconds = in_turn(ways, repeats * len(batches))
    for name in names[1:]:
        ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds[name], strict=True))
        print(f"{name} / ours {ratio:.2f} (median of the steps' ratios)")


def gather(repeats: int) -> None:
    """Print what it takes to gather MiniLM's 22.7 million parameters from the ranks that torchrun started."""
    dist.init(torch.device("cpu"), 600)
    share = 22_700_000 // dist.world_size()
    whole, mine = torch.empty(share * dist.world_size()), torch.randn(share)

    def by(way: Callable[..., Any]) -> Callable[[int], None]:
        def act(turn: int) -> None:
            way(whole, mine)
            dist.barrier()

        return act

    ways = {"all-gather": by(torch.distributed.all_gather_into_tensor), "broadcasts": by(dist.gather_by_broadcasts)}
    seconds = in_turn(ways, repeats)
    for name, measured in seconds.items():
        dist.log0(f"{name:12} {1000 * statistics.median(measured):7.1f} ms (median of {repeats})")
    dist.destroy()


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "attention", "compiled", "gather"))
    parser.add_argument(
        "--repeats", type=int, help="of steps (overhead 60, attention 5, compiled 4 a length) or gathers (20)"
    )
    arguments = parser.parse_args()
    ways = {
        "overhead": (overhead, 60),
        "attention": (attention, 5),
        "compiled": (compiled, 4),
        "gather": (gather, 20),
    }
    measure, usual = ways[arguments.what]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    measure(arguments.repeats or usual)


if __name__ == "__main__":
    main()
