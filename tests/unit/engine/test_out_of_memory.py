"""Out of memory: one line with what needs less, for a GPU and a host; other errors pass."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, ViTConfig

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import ds_config
from qa_deepspeed.engine.out_of_memory import explain_out_of_memory
from qa_deepspeed.utils.errors import UserError
from tests.paths import REPOSITORY

CONFIG = BertConfig(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048)
GPU, CPU = torch.device("cuda"), torch.device("cpu")


def message(device: torch.device, error: Exception, **options: object) -> str:
    given = {"deepspeed_config": "zero2", "per_gpu_train_batch_size": 8, **options}
    resolved = ds_config.resolve(RunOptions(**given, given=frozenset(given)), 1, device.type)  # type: ignore[arg-type]
    with pytest.raises(UserError) as raised, explain_out_of_memory(resolved, CONFIG, device):
        raise error
    assert "\n" not in str(raised.value)
    return str(raised.value)


def numbers(line: str) -> dict[str, float]:
    """GiB by the words before them."""
    parts = line.split("by the memory plan; ")[1].removesuffix(" GiB").split(", ")
    return {" ".join(part.split()[:-1]): float(part.split()[-1]) for part in parts}


def test_a_gpu_without_memory() -> None:
    line = message(GPU, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert line.startswith("out of GPU memory (CUDA out of memory): zero2 with 8 rows of 384 tokens needs ")
    needed, ways = float(line.split("needs ")[1].split()[0]), numbers(line)
    assert {"--per_gpu_train_batch_size 4", "--gradient_checkpointing"} < ways.keys() and len(ways) == 3
    assert all(value < needed for value in ways.values())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory: 4 bytes"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_a_host_without_memory(error: Exception) -> None:
    line = message(CPU, error)
    assert line.startswith("out of host memory") and "zero2 with 8 rows of 384 tokens needs " in line
    needed, ways = float(line.split("needs ")[1].split()[0]), numbers(line)
    assert all(value < needed for value in ways.values()) and "--gradient_checkpointing" in ways


def test_what_is_in_use_already_is_not_advised() -> None:
    ways = message(GPU, torch.OutOfMemoryError(), gradient_checkpointing=True, per_gpu_train_batch_size=1)
    assert "--gradient_checkpointing" not in ways and "--per_gpu_train_batch_size" not in ways


def test_a_model_that_the_plan_does_not_cover() -> None:
    resolved = ds_config.resolve(RunOptions(deepspeed_config="zero2"), 1, "cuda")
    with pytest.raises(UserError, match="use fewer rows"), explain_out_of_memory(resolved, ViTConfig(), GPU):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_fewer_rows_are_counted_with_the_checkpointing_of_the_run() -> None:
    with_it, without = (
        numbers(message(GPU, torch.OutOfMemoryError(), gradient_checkpointing=flag))["--per_gpu_train_batch_size 4"]
        for flag in (True, False)
    )
    assert with_it < without


@pytest.mark.parametrize("name", [str(REPOSITORY / "ds_configs" / "zero2.json"), "zero2.json"])
def test_a_config_by_its_file_is_counted(name: str) -> None:
    assert " GiB a rank by the memory plan" in message(GPU, torch.OutOfMemoryError(), deepspeed_config=name)


def test_other_errors_pass() -> None:
    resolved = ds_config.resolve(RunOptions(deepspeed_config="zero2"), 1, "cpu")
    for error in (RuntimeError("shape mismatch"), OSError(28, "No space left on device"), KeyError("x")):
        with pytest.raises(type(error)), explain_out_of_memory(resolved, CONFIG, CPU):
            raise error
