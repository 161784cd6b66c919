"""One rank that trains on full rows and writes its memory: `-m tests.distributed.memory MODEL OPTIONS OUT`."""

import json
import sys
import threading
from pathlib import Path

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
    """What DeepSpeed's communication logger has counted: operation -> bytes of a message -> [times, ...]."""
    import deepspeed

    return deepspeed.comm.comm.comms_logger.comms_dict


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
    config["comms_logger"] = {"enabled": True, "prof_all": True, "verbose": False}
    engine = training_engine(model, config, resolved, STEPS, device)
    made, born = anonymous(), most["all"]
    most["all"] = 0
    engine.module.train()
    rows, length = resolved.plan.micro_batch_size, options.max_seq_length
    steps = []
    for step in range(STEPS):
        torch.manual_seed(step)
        collectives().clear()
        ids = torch.randint(0, model_config.vocab_size, (rows, length), device=device)
        engine.begin_micro_batch(last=True)
        logits = engine.train_forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        possible = torch.ones(rows, length, dtype=torch.bool, device=device)
        place = torch.zeros(rows, dtype=torch.long, device=device)
        engine.backward(span_loss(logits["start_logits"], logits["end_logits"], place, place, possible).mean())
        del logits
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
        "most": most["all"],
        "moved": {name: {size: seen[0] for size, seen in sizes.items()} for name, sizes in collectives().items()},
        "gpu": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    }
    Path(f"{sys.argv[3]}-{dist.rank()}").write_text(json.dumps(found))
    dist.destroy()


if __name__ == "__main__":
    main()
