"""One rank that trains on full rows and writes its memory: `-m tests.distributed.memory MODEL OPTIONS OUT`."""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import ds_config, zero3_loading
from qa_deepspeed.engine.device import choose_device
from qa_deepspeed.engine.engine import import_deepspeed, training_engine
from qa_deepspeed.models.loading import load_config, quiet_transformers
from qa_deepspeed.models.lora import LoraSettings, add_adapters
from qa_deepspeed.qa.decoding.spans import span_loss
from qa_deepspeed.utils import dist

STEPS = 3
SAMPLE_SECONDS = 0.005


def anonymous() -> int:
    """Anonymous memory of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def collectives() -> dict:
    """What DeepSpeed's communication logger has counted: "operation ranks" -> bytes of a message -> [times, ...]."""
    import deepspeed

    return deepspeed.comm.comm.comms_logger.comms_dict


def name_ranks() -> None:
    """Let DeepSpeed's logger count the collectives of each group of ranks by themselves, under a name of their own."""
    import deepspeed

    comm = deepspeed.comm.comm

    def named(operation: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **settings: Any) -> Any:
            ranks = torch.distributed.get_process_group_ranks(settings.get("group") or torch.distributed.group.WORLD)
            return call(*arguments, log_name=f"{operation} {min(ranks)}-{max(ranks)}", **settings)

        return counted

    for operation in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        function = named(operation, getattr(comm, operation))
        setattr(comm, operation, function)
        setattr(deepspeed.comm, operation, function)


def sent(moved: dict[str, dict[str, int]]) -> dict[str, float]:
    """Bytes that one rank sends by ring algorithms for the messages of each group of ranks, "first-last".

    The logger has the input's bytes: for an all-gather that is one rank's part, for a reduce-scatter the whole.
    """
    found: dict[str, float] = {}
    for name, sizes in moved.items():
        operation, group = name.split()
        first, last = map(int, group.split("-"))
        ranks = last - first + 1
        part = (ranks - 1) / ranks
        of = {"all_reduce": 2 * part, "all_gather_into_tensor": ranks * part, "reduce_scatter_tensor": part}
        found.setdefault(group, 0)
        found[group] += of[operation] * sum(int(size) * count for size, count in sizes.items())
    return found


def main() -> None:
    """Write what this rank used as JSON to OUT-RANK: anonymous memory on the way, the most that a GPU's tensors had."""
    options = RunOptions(**json.loads(sys.argv[2]), model_name_or_path=sys.argv[1])
    dist.ensure_rank_env()
    quiet_transformers(False)
    device = choose_device(no_cuda=False)  # the environment of a launch on CPUs hides the GPUs
    dist.init(device, 600)
    resolved = ds_config.resolve(options, dist.world_size(), device.type)
    most, stop = {"all": 0}, threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            most["all"] = max(most["all"], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    model_config = load_config(options)
    config = ds_config.finish(resolved, STEPS, ds_config.hidden_size(model_config))
    if resolved.zero_stage == 3:
        import_deepspeed(False)
    before = anonymous()
    model, _ = zero3_loading.load(options, model_config, config)
    adapters = LoraSettings.of(options.to_dict())
    if adapters is not None:
        add_adapters(model, adapters, sys.argv[1], options.seed)
    loaded = anonymous()
    name_ranks()
    config["comms_logger"] = {"enabled": True, "prof_all": True, "verbose": False}
    engine = training_engine(model, config, resolved, STEPS, device)
    made, born = anonymous(), most["all"]
    most["all"] = 0
    engine.module.train()
    rows, length = resolved.plan.micro_batch_size, options.max_seq_length
    steps, losses = [], []
    for step in range(STEPS):
        torch.manual_seed(step)
        collectives().clear()
        ids = torch.randint(0, model_config.vocab_size, (rows, length), device=device)
        engine.begin_micro_batch(last=True)
        logits = engine.train_forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        possible = torch.ones(rows, length, dtype=torch.bool, device=device)
        place = torch.zeros(rows, dtype=torch.long, device=device)
        loss = span_loss(logits["start_logits"], logits["end_logits"], place, place, possible).mean()
        engine.backward(loss)
        losses.append(loss.item())
        seconds = [getattr(parameter, "ds_secondary_tensor", None) for parameter in engine.module.parameters()]
        secondary = sum(second.nbytes for second in seconds if second is not None)
        del logits, loss
        engine.step(want_norm=True)
        steps.append(anonymous())
    stop.set()
    watcher.join()
    found = {
        "before": before,
        "loaded": loaded,
        "engine": made,
        "loading": born,
        "steps": steps,
        "losses": losses,
        "secondary": secondary,
        "most": most["all"],
        "moved": {name: {size: seen[0] for size, seen in sizes.items()} for name, sizes in collectives().items()},
        "gpu": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    }
    Path(f"{sys.argv[3]}-{dist.rank()}").write_text(json.dumps(found))
    dist.destroy()


if __name__ == "__main__":
    main()
