"""The plan's memory of one GPU against what a training takes there, BERT-shaped models in bfloat16 on full rows."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, BertConfig

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import ds_config
from qa_deepspeed.engine.memory import PROCESS_DEVICE_BYTES, ZeroSettings, estimate_memory
from qa_deepspeed.models.footprint import footprint
from tests.distributed.launching import free_port, run
from tests.gpu.on_gpu import ON_GPU, gpu_marks
from tests.paths import REPOSITORY

pytestmark = gpu_marks

ROWS, LENGTH = 8, 384
SIZES = {"66M": (768, 6, 12), "335M": (1024, 24, 16)}
"""Width, layers and heads, by the number of parameters."""
CONFIGS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def model_config(size: str) -> BertConfig:
    width, layers, heads = SIZES[size]
    return BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], int]:
    """Bytes that tensors had on the GPU at most, by size and config."""
    folder: Path = tmp_path_factory.mktemp("memory")
    for size in SIZES:
        AutoModelForQuestionAnswering.from_config(model_config(size)).save_pretrained(folder / size)

    def measure(case: tuple[str, str]) -> int:
        size, name = case
        options = {"deepspeed_config": name, "per_gpu_train_batch_size": ROWS, "max_seq_length": LENGTH, "bf16": True}
        command = ["torchrun", "--nproc_per_node", "1", "--master_port", free_port(), "-m", "tests.distributed.memory"]
        done = run(
            [*command, str(folder / size), json.dumps(options), str(folder / f"{size}-{name}")], REPOSITORY, **ON_GPU
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((folder / f"{size}-{name}-0").read_text())["gpu"]

    cases = list(product(SIZES, CONFIGS))
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(cases, pool.map(measure, cases), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", SIZES)
def test_the_prediction_is_within_15_percent(measured: dict[tuple[str, str], int], size: str, name: str) -> None:
    options = RunOptions(deepspeed_config=name, per_gpu_train_batch_size=ROWS, max_seq_length=LENGTH, bf16=True)
    zero = ZeroSettings.of(ds_config.finish(ds_config.resolve(options, 1, "cuda"), 1, SIZES[size][0]))
    model = footprint(model_config(size), ROWS, LENGTH, torch.bfloat16)
    wanted = estimate_memory(model, zero, 1, 2, 1)
    predicted, found = wanted.device() - PROCESS_DEVICE_BYTES, measured[size, name]
    print(f"{size} {name}: measured {found >> 20} MiB, predicted {predicted >> 20} MiB ({predicted / found - 1:+.1%})")
    assert predicted == pytest.approx(found, rel=0.15)
    if name.endswith("_offload"):
        assert found < measured[size, name.removesuffix("_offload")] - 10 * model.parameters
