"""DeepSpeed configs: found by name or path, agreed with the options, every "auto" filled, conflicts all at once."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import compiled_ops, ds_config
from qa_deepspeed.engine.config_keys import SECTIONS
from qa_deepspeed.utils.errors import UserError


def options(**given: Any) -> RunOptions:
    return RunOptions(**given, given=frozenset(given))


def write(folder: Path, config: Any) -> str:
    path = folder / "mine.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("name", ds_config.shipped())
@pytest.mark.parametrize("world_size", [1, 2, 8, 64])
def test_every_shipped_config_resolves_at_any_world_size(name: str, world_size: int) -> None:
    autocast = name.endswith("autocast")
    asked = options(deepspeed_config=name, bf16=not autocast, nvme_path="/")
    resolved = ds_config.resolve(asked, world_size, "cuda")
    config = ds_config.finish(resolved, total_steps=100, hidden_size=768)
    assert '"auto"' not in json.dumps(config)
    assert config["train_batch_size"] == 8 * world_size
    assert config["bf16"]["enabled"] != autocast and not config["fp16"]["enabled"]
    assert resolved.precision == ("torch_autocast" if autocast else "bf16")
    assert config["gradient_clipping"] == 1.0


def test_a_config_written_for_trainer_is_filled(tmp_path: Path) -> None:
    """Every "auto" that transformers.Trainer's documentation shows."""
    written = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
                "total_num_steps": "auto",
            },
        },
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    name = write(tmp_path, written)
    asked = options(deepspeed_config=name, learning_rate=3e-5, warmup_steps=10, global_batch_size=64)
    config = ds_config.finish(ds_config.resolve(asked, 2, "cpu"), total_steps=100, hidden_size=10)
    assert config["optimizer"]["params"] == {"lr": 3e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    assert config["scheduler"]["params"] == {
        "warmup_min_lr": 0,
        "warmup_max_lr": 3e-5,
        "warmup_num_steps": 10,
        "total_num_steps": 100,
    }
    zero = config["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (100, 90)
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (64, 4)


def test_numbers_of_a_plain_config_count_where_the_command_line_is_silent(tmp_path: Path) -> None:
    name = write(
        tmp_path,
        {
            "train_micro_batch_size_per_gpu": 4,
            "train_batch_size": 32,
            "gradient_clipping": 0.5,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        },
    )
    resolved = ds_config.resolve(options(deepspeed_config=name), 2, "cpu")
    assert (
        resolved.plan.micro_batch_size,
        resolved.plan.gradient_accumulation_steps,
        resolved.plan.global_batch_size,
    ) == (4, 4, 32)
    assert (resolved.options.max_grad_norm, resolved.options.learning_rate) == (0.5, 1e-4)


def test_all_conflicts_come_in_one_message_with_both_owners(tmp_path: Path) -> None:
    name = write(tmp_path, {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.5, "fp16": {"enabled": True}})
    asked = options(deepspeed_config=name, per_gpu_train_batch_size=8, max_grad_norm=1.0, bf16=True)
    with pytest.raises(UserError) as error:
        ds_config.resolve(asked, 1, "cuda")
    message = str(error.value)
    for part in (
        "train_micro_batch_size_per_gpu is 4",
        "per_gpu_train_batch_size is 8",
        "gradient_clipping is 0.5",
        "max_grad_norm is 1.0",
        "fp16.enabled is true",
        "asks for bf16",
    ):
        assert part in message
    assert "\n" not in message


def test_saying_the_same_in_both_places_is_no_conflict(tmp_path: Path) -> None:
    name = write(tmp_path, {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}})
    resolved = ds_config.resolve(options(deepspeed_config=name, per_gpu_train_batch_size=4, bf16=True), 1, "cpu")
    assert (resolved.plan.micro_batch_size, resolved.precision) == (4, "bf16")


@pytest.mark.parametrize(
    ("given", "device", "bf16_works", "precision"),
    [
        ({}, "cpu", True, "fp32"),
        ({"bf16": True}, "cpu", True, "bf16"),
        ({"fp16": True}, "cuda", True, "fp16"),
        ({"fp16_opt_level": "O2"}, "cuda", True, "fp16"),
        ({"fp16": True, "fp16_opt_level": "O0"}, "cuda", True, "fp32"),
        ({"fp16": True, "fp16_opt_level": "O1"}, "cpu", True, "torch_autocast"),
        ({"fp16_opt_level": "O1", "deepspeed_config": "zero0"}, "cuda", False, "torch_autocast"),
    ],
)
def test_precision_flags_choose_the_section(given: dict, device: str, bf16_works: bool, precision: str) -> None:
    resolved = ds_config.resolve(options(**given), 1, device, bf16_works)
    assert resolved.precision == precision
    if precision == "torch_autocast":
        assert resolved.config["torch_autocast"]["dtype"] == ("bfloat16" if bf16_works else "float16")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fp16": True}, "fp16 does not run on a CPU: take --bf16"),
        ({"attn_implementation": "flash_attention_2", "bf16": True}, "flash_attention_2 computes in half precision"),
        ({"fp16_opt_level": "O3"}, "O3 is not offered"),
        ({"bf16": True, "fp16": True}, "exclude each other"),
        ({"deepspeed_config": "zero22"}, "did you mean 'zero2'"),
        ({"fp16_opt_level": "O1"}, "ZeRO stage 0 only"),
        ({"deepspeed_config": "zero3_zeropp"}, "need GPUs: take zero3"),
        ({"deepspeed_config": "zero2_autocast", "bf16": True}, "torch_autocast.enabled is true in zero2_autocast"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ds_config.resolve(options(**given), 1, "cpu", bf16_supported="fp16_opt_level" not in given)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_broken_config_file_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(UserError, match="mine.json"):
        ds_config.load(str(tmp_path / "mine.json"))


def test_an_auto_that_nobody_owns_is_named(tmp_path: Path) -> None:
    name = write(tmp_path, {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "auto"}})
    with pytest.raises(UserError, match="zero_optimization.stage3_max_live_parameters"):
        ds_config.finish(ds_config.resolve(options(deepspeed_config=name), 1, "cpu"), 10, 10)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"gradient_cliping": 1.0}, "'gradient_cliping'; did you mean 'gradient_clipping'?"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "'zero_optimization.overlap_com'; did you mean"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, "offload_optimizer.devise"),
        ({"amp": {"enabled": True}}, "'amp'"),
    ],
)
def test_keys_that_deepspeed_would_pass_over_are_told_with_the_nearest(tmp_path: Path, config: Any, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        ds_config.resolve(options(deepspeed_config=write(tmp_path, config)), 1, "cpu")


def test_the_known_keys_are_those_of_the_installed_deepspeed() -> None:
    """In a process of its own: importing DeepSpeed decides on an accelerator."""
    code = """if True:
        import json
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from deepspeed.runtime.zero.offload_config import (
            DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig)
        models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config,
                  "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
                  "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig}
        print(json.dumps({name: [field.alias or key for key, field in model.model_fields.items()]
                          for name, model in models.items()}))
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert {name: set(keys.split()) for name, keys in SECTIONS.items() if name} == {
        name: set(keys) for name, keys in theirs.items()
    }


@pytest.mark.parametrize("asked", [{"writer": {"type": "fast", "decoupled": True}}, {"load_universal": True}])
def test_other_ways_to_save_are_refused_in_training(tmp_path: Path, asked: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"checkpoint": asked}))
    resolved = ds_config.resolve(options(deepspeed_config=str(tmp_path / "config.json")), 1, "cpu")
    with pytest.raises(UserError, match=f"checkpoint.{next(iter(asked))} does not go with"):
        ds_config.check_trainable(resolved)


def test_float16_at_stage_0_is_refused_in_training() -> None:
    with pytest.raises(UserError, match="take --deepspeed_config zero1"):
        ds_config.check_trainable(ds_config.resolve(options(deepspeed_config="zero0", fp16=True), 1, "cuda"))
    ds_config.check_trainable(ds_config.resolve(options(deepspeed_config="zero1", fp16=True), 1, "cuda"))


@pytest.mark.parametrize("given", [{}, {"nvme_path": "/no/such/folder"}])
def test_nvme_without_a_folder_is_one_line(given: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pass --nvme_path, a folder there that can be written"):
        ds_config.check_trainable(ds_config.resolve(options(deepspeed_config="zero3_nvme", **given), 2, "cpu"))
    given = {"nvme_path": str(tmp_path)}
    resolved = ds_config.resolve(options(deepspeed_config="zero3_nvme", **given), 2, "cpu")
    ds_config.check_trainable(resolved)
    offload = resolved.config["zero_optimization"]
    assert offload["offload_param"]["nvme_path"] == offload["offload_optimizer"]["nvme_path"] == str(tmp_path)


def test_what_an_operator_lacks_is_told_with_what_to_take_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(compiled_ops, "_header_folders", lambda: [str(tmp_path)])
    config = ds_config.resolve(options(deepspeed_config="zero3_nvme"), 2, "cpu").config
    with pytest.raises(UserError, match="no no-such-compiler.*apt install libaio-dev, or take .* zero3_offload"):
        compiled_ops.require(config)
    (tmp_path / "libaio.h").touch()
    monkeypatch.setenv("CXX", "sh")
    assert compiled_ops.require(config) == ["async_io"]
    assert compiled_ops.needed_operators(ds_config.load("zero3_zeropp")) == ["quantizer"]
