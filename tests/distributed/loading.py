"""One rank that loads checkpoints under ZeRO-3: `-m tests.distributed.loading FOLDER LARGE CASE...`.

Each CASE of FOLDER must come out as `from_pretrained` gives it, to the bit; while LARGE loads, anonymous memory is
watched.
"""

import sys
import threading
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForQuestionAnswering

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import ds_config, zero3_loading
from qa_deepspeed.engine.device import choose_device
from qa_deepspeed.engine.engine import import_deepspeed
from qa_deepspeed.models.loading import load_config, quiet_transformers
from qa_deepspeed.utils import dist
from tests.distributed.memory import anonymous

SAMPLE_SECONDS = 0.001


def load(name: Path, device: torch.device, **asked: Any) -> tuple[Any, list[str]]:
    """Under ZeRO-3, as training loads."""
    options = RunOptions(model_name_or_path=str(name), deepspeed_config="zero3", **asked)
    resolved = ds_config.resolve(options, dist.world_size(), device.type)
    config = ds_config.finish(resolved, 1, 8)
    transformers.set_seed(options.seed)
    return zero3_loading.load(options, load_config(options), config)


def same(name: Path, device: torch.device, dtype: torch.dtype, **asked: Any) -> None:
    """Every parameter and buffer, gathered, against Transformers' own without ZeRO; also which are fresh."""
    import deepspeed

    born, fresh = load(name, device, **asked)
    transformers.set_seed(42)
    plain, report = AutoModelForQuestionAnswering.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    assert fresh == sorted(report["missing_keys"]), (name, fresh, report)
    expected = dict(plain.named_parameters()) | dict(plain.named_buffers())
    found = dict(born.named_parameters()) | dict(born.named_buffers())
    assert found.keys() == expected.keys(), name  # tied ones are listed once, under the same name
    for key, value in found.items():
        with deepspeed.zero.GatheredParameters([value], enabled=hasattr(value, "ds_id")):
            kind = dtype if isinstance(value, torch.nn.Parameter) else value.dtype
            assert torch.equal(value, expected[key].to(kind)), (name, key)


def memory(name: Path, device: torch.device) -> None:
    """Above what was there before, a rank never holds more than its share and one whole parameter, the largest."""
    before, most, stop = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model, _ = load(name, device)
    stop.set()
    watcher.join()
    sizes = [parameter.ds_numel * 4 for parameter in model.parameters()]
    allowed = sum(sizes) // dist.world_size() + max(sizes)
    print(f"rank {dist.rank()}: {(most[0] - before) >> 20} MiB, allowed {allowed >> 20}", flush=True)
    assert sum(sizes) // 4 < most[0] - before <= allowed


def main() -> None:
    """Everything in one launch, since starting costs most."""
    dist.ensure_rank_env()
    quiet_transformers(False)
    device = choose_device(True)
    dist.init(device, 60)
    import_deepspeed(False)
    folder, large, *cases = sys.argv[1:]
    load(Path(folder) / cases[0], device)  # what is imported only now is no memory of the model
    memory(Path(folder) / large, device)
    for case in cases:
        same(Path(folder) / case, device, torch.float32)
    same(Path(folder) / cases[0], device, torch.bfloat16, bf16=True)
    dist.destroy()


if __name__ == "__main__":
    main()
