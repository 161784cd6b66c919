"""The plan's host memory of CPU ranks, and its traffic, against ranks that train.

Half a minute and more for each: `launch/test.sh -m slow -k within_15_percent`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, BertConfig

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import ds_config
from qa_deepspeed.engine.memory import ZeroSettings, estimate_cpu_memory
from qa_deepspeed.models.footprint import footprint
from qa_deepspeed.models.lora import LoraSettings
from tests.distributed.launching import free_port, run
from tests.distributed.memory import sent
from tests.paths import REPOSITORY

RANKS, ROWS, LENGTH = 2, 4, 192
SIZES = {"14M": (256, 8, 4), "66M": (768, 6, 12), "109M": (768, 12, 12)}
"""Width, layers and heads, by the number of parameters."""

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CONFIGS = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every size; made when it is first asked for."""
    return {name: tmp_path_factory.mktemp("models") / name for name in SIZES}


def model_config(size: str) -> BertConfig:
    width, layers, heads = SIZES[size]
    return BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", SIZES)
def test_the_prediction_is_within_15_percent(models: dict[str, Path], tmp_path: Path, size: str, name: str) -> None:
    compare(models, tmp_path, size, {"deepspeed_config": name})


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3"])
def test_that_of_adapters_is_within_15_percent(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    compare(models, tmp_path, "66M", {"deepspeed_config": name, "lora_rank": 8})


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_that_of_other_numbers_of_ranks_is_within_15_percent(
    models: dict[str, Path], tmp_path: Path, ranks: int, name: str
) -> None:
    compare(models, tmp_path, "109M", {"deepspeed_config": name}, ranks)


def compare(models: dict[str, Path], folder: Path, size: str, options: dict[str, Any], ranks: int = RANKS) -> None:
    """Train; the ranks' memory and messages are those of the plan."""
    if not models[size].exists():
        AutoModelForQuestionAnswering.from_config(model_config(size)).save_pretrained(models[size])
    options = {**options, "per_gpu_train_batch_size": ROWS, "max_seq_length": LENGTH}
    command = [
        "torchrun",
        "--nproc_per_node",
        str(ranks),
        "--master_port",
        free_port(),
        "-m",
        "tests.distributed.memory",
    ]
    done = run([*command, str(models[size]), json.dumps(options), str(folder / "rank")], REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((folder / f"rank-{rank}").read_text()) for rank in range(ranks)]
    run_options = RunOptions(**options)
    zero = ZeroSettings.of(ds_config.finish(ds_config.resolve(run_options, ranks, "cpu"), 1, SIZES[size][0]))
    lora = LoraSettings.of(run_options.to_dict())
    model = footprint(model_config(size), ROWS, LENGTH, torch.float32, lora)
    wanted = estimate_cpu_memory(model, zero, ranks, 4, 1)
    measured = max(one["most"] for one in found)
    print(
        f"{size}{' LoRA' if lora else ''} {ranks} x {options['deepspeed_config']}: measured {measured >> 20} MiB, "
        f"predicted {wanted.host >> 20} MiB ({wanted.host / measured - 1:+.1%})"
    )
    assert wanted.host == pytest.approx(measured, rel=0.15)
    assert sum(sent(found[0]["moved"]).values()) == pytest.approx(wanted.sent, rel=0.02)
