"""Time and size of a checkpoint: what training waits for, and torch.save and torch.load of the same state beside it.

    torchrun --nproc_per_node 2 tests/bench/bench_checkpoint.py --model MODEL --folder FOLDER [--repeats 3]
        [--stages zero3]

At each ZeRO stage a model takes a step, so that its optimizer has a state, and is saved and loaded by turns: by the
trainer at once ("save": shards, checksums, everything on the disk, the rename) and in the background ("stall": until
training continues; "written": until the checkpoint is complete; "step": a training step alone, "step meanwhile": the
first one while files are written); and by torch.save and torch.load of the objects in the same files, divided among the
ranks and written down to the disk too. Before the trainer loads, it checks the checksums ("check"). A time is that of
the slowest rank, the median of the repeats; a size is bytes for each parameter of the model; "copies" are MiB of host
memory that the background save takes on rank 0.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import ds_config, zero3_loading
from qa_deepspeed.engine.checkpoints import checkpoint
from qa_deepspeed.engine.checkpoints.checkpoint_files import LoopState, total_bytes, verify_checkpoint
from qa_deepspeed.engine.deepspeed_compat import plain_values_only
from qa_deepspeed.engine.engine import Engine, training_engine
from qa_deepspeed.models.facts import model_facts
from qa_deepspeed.training.validate import validate_options
from qa_deepspeed.utils import dist

STAGES = ("zero0", "zero1", "zero2", "zero3")
ROWS, LENGTH = 4, 128


def seconds(act: Callable[[], object]) -> float:
    """How long the slowest rank takes; all begin together."""
    dist.barrier()
    began = time.perf_counter()
    act()
    return dist.all_reduce_max([time.perf_counter() - began])[0]


def stepped(model: str, stage: str, folder: Path) -> Engine:
    """An engine that has made an update."""
    given = {"model_name_or_path": model, "output_dir": str(folder), "deepspeed_config": stage}
    resolved = validate_options(RunOptions(**given, given=frozenset(given)), dist.world_size(), "cpu", True)  # type: ignore[arg-type]
    facts = model_facts(resolved.options)
    config = ds_config.finish(resolved, 10, ds_config.hidden_size(facts.config))
    built, _ = zero3_loading.load(resolved.options, facts.config, config)
    engine = training_engine(built, config, resolved, 10, torch.device("cpu"))
    take_step(engine)
    return engine


def take_step(engine: Engine) -> None:
    """One optimizer step on random tokens."""
    ids = torch.randint(1000, 2000, (ROWS, LENGTH))
    engine.begin_micro_batch(last=True)
    outputs = engine.train_forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    engine.backward(outputs.start_logits.float().logsumexp(1).sum())
    engine.step(want_norm=False)


def anonymous_mib() -> float:
    """Anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise AssertionError("Linux says RssAnon")


def write(states: dict[str, Any], folder: Path) -> None:
    """torch.save of each, down to the disk."""
    for name, value in states.items():
        with (folder / name).open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())


def read(paths: list[Path]) -> dict[str, Any]:
    """torch.load of each."""
    with plain_values_only():
        return {path.name: torch.load(path, map_location="cpu", weights_only=True) for path in paths}


def measure(model: str, stage: str, folder: Path, repeats: int) -> dict[str, Any]:
    """One line of the table."""
    engine = stepped(model, stage, folder)
    state = LoopState(
        1,
        dist.world_size(),
        engine.zero_stage,
        engine.precision,
        "cpu",
        {"global_batch_size": 16},
        1,
        engine.optimized_names,
        {},
        engine.config,
        {},
        {},
        flat=engine.flat_names,
    )
    writer = checkpoint.CheckpointWriter(engine, folder, None)
    in_background = checkpoint.CheckpointWriter(engine, folder, None, "true")
    ours, plain = folder / "checkpoint-1", folder / "plain"
    plain.mkdir(exist_ok=True)
    times: dict[str, list[float]] = {}
    copies: list[float] = []

    def take(what: str, act: Callable[[], object]) -> None:
        times.setdefault(what, []).append(seconds(act))

    for _ in range(repeats):
        take("save", lambda: writer.save(state))
        take("step", lambda: take_step(engine))
        before = anonymous_mib()
        take("stall", lambda: in_background.save(state))
        copies.append(anonymous_mib() - before)
        take("step meanwhile", lambda: take_step(engine))
        take("written", in_background.wait)
        times["written"][-1] += times["stall"][-1] + times["step meanwhile"][-1]
        take("check", lambda: verify_checkpoint(ours) if dist.is_rank_zero() else None)
        take("load", lambda: checkpoint.load(engine, ours, state))
        mine = sorted(ours.glob("*.pt"))[dist.rank() :: dist.world_size()]
        states = read(mine)
        take("torch.save", lambda: write(states, plain))  # noqa: B023
        take("torch.load", lambda: read([plain / path.name for path in mine]))  # noqa: B023
    numbers = {what: round(statistics.median(found), 3) for what, found in times.items()}
    numbers |= {"stall/save": round(numbers["stall"] / numbers["save"], 3), "copies": round(max(copies))}
    numbers |= {"bytes": round(total_bytes(ours) / engine.parameters, 2)}
    numbers |= {"torch.save bytes": round(total_bytes(plain) / engine.parameters, 2)}
    parameters = engine.parameters
    engine.close()
    dist.barrier()
    if dist.is_rank_zero():
        shutil.rmtree(folder)
    return {"stage": stage, "parameters": parameters, **numbers}


def main() -> None:
    """Measure each stage; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="configs to measure (default: all)")
    arguments = parser.parse_args()
    dist.ensure_rank_env()
    dist.init(torch.device("cpu"), 600)
    for stage in arguments.stages:
        folder = arguments.folder / stage
        folder.mkdir(parents=True, exist_ok=True)
        dist.log0(json.dumps(measure(arguments.model, stage, folder, arguments.repeats)))
    dist.destroy()


if __name__ == "__main__":
    main()
