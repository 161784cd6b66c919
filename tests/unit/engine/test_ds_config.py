"""DeepSpeed configs: found by name or path, merged with the options, every "auto" filled, conflicts all at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import compiled_ops, config_check, ds_config
from qa_deepspeed.engine.config_check import check_config
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


def test_numbers_of_a_config_count_unless_the_command_line_gives_them(tmp_path: Path) -> None:
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


def test_the_same_value_in_both_places_is_no_conflict(tmp_path: Path) -> None:
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
def test_flags_choose_the_precision(given: dict[str, Any], device: str, bf16_works: bool, precision: str) -> None:
    resolved = ds_config.resolve(options(**given), 1, device, bf16_works)
    assert resolved.precision == precision
    if precision == "torch_autocast":
        assert resolved.config["torch_autocast"]["dtype"] == ("bfloat16" if bf16_works else "float16")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fp16": True}, "fp16 does not run on a CPU: use --bf16"),
        ({"attn_implementation": "flash_attention_2", "bf16": True}, "flash_attention_2 computes in half precision"),
        ({"fp16_opt_level": "O3"}, "O3 is not supported"),
        ({"bf16": True, "fp16": True}, "exclude each other"),
        ({"deepspeed_config": "zero22"}, "did you mean 'zero2'"),
        ({"fp16_opt_level": "O1"}, "ZeRO stage 0 only"),
        ({"deepspeed_config": "zero3_zeropp"}, "need GPUs: use zero3, or a copy of the config without"),
        ({"deepspeed_config": "zero2_autocast", "bf16": True}, "torch_autocast.enabled is true in zero2_autocast"),
    ],
)
def test_unsupported_options_are_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ds_config.resolve(options(**given), 1, "cpu", bf16_supported="fp16_opt_level" not in given)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_broken_config_file_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(UserError, match="mine.json"):
        ds_config.load(str(tmp_path / "mine.json"))


def test_an_auto_that_no_option_fills_is_named(tmp_path: Path) -> None:
    name = write(tmp_path, {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "auto"}})
    with pytest.raises(UserError, match="zero_optimization.stage3_max_live_parameters"):
        ds_config.finish(ds_config.resolve(options(deepspeed_config=name), 1, "cpu"), 10, 10)


ZERO2 = {"stage": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {**ZERO2, "overlap_com": True}}, "'zero_optimization.overlap_com'; did you mean 'over"),
        (
            {"zero_optimization": {**ZERO2, "offload_optimizer": {"devise": "cpu"}}},
            "offload_optimizer.devise'",
        ),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "MiCS ZeRO-3 sharding has been removed"),
        ({"zero_optimization": {"stage": 9}}, "zero_optimization.stage is 9: input should be 0, 1, 2"),
        ({"zero_optimization": {"stage": "3"}}, 'zero_optimization.stage is "3", a number in quotes'),
        ({"zero_optimization": {**ZERO2, "reduce_bucket_size": -1}}, "reduce_bucket_size is -1: input"),
        ({"zero_optimization": {**ZERO2, "reduce_bucket_size": "2e8"}}, '"2e8", a number in quotes'),
        (
            {"zero_optimization": {**ZERO2, "reduce_bucket_size": "big"}},
            'reduce_bucket_size is "big"',
        ),
        ({"zero_optimization": {**ZERO2, "cpu_offload": True, "offload_optimizer": {}}}, "parameter 'cpu_offload'"),
        ({"gradient_accumulation_steps": "8"}, 'gradient_accumulation_steps is "8", a number in quotes'),
        ({"steps_per_print": "10"}, 'steps_per_print is "10", a number in quotes'),
        ({"gradient_clipping": "some"}, 'gradient_clipping is "some": it must be a number'),
        ({"train_batch_size": [4]}, "train_batch_size is [4]: it must be an integer"),
        ({"train_batch_size": -4}, "train_batch_size is -4: it must be at least 1"),
        ({"wall_clock_breakdown": "yes"}, 'wall_clock_breakdown is "yes": it must be true or false'),
        ({"communication_data_type": "fp19"}, "communication_data_type: Invalid communication_data_type"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bfloat16 and fp16 modes cannot"),
        ({"bf16": [True]}, "bf16 must hold a JSON object"),
        ({"flops_profiler": 3}, "flops_profiler: 'int' object"),
        ({"eigenvalue": {"enabled": True}}, "'eigenvalue' configuration block is no longer supported"),
        ({"amp": {"enabled": True}}, "Apex AMP integration has been removed"),
        (
            {"optimizer": {"type": "AdamV"}},
            "optimizer.type AdamV is neither DeepSpeed's nor torch's; did",
        ),
        ({"optimizer": {"params": {}}}, "optimizer.type is missing"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": "3e-5"}}},
            'optimizer.params.lr is "3e-5", a number',
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"weight_decai": 0}}},
            "weight_decai is no argument of AdamW",
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"momentun": 0}}},
            "momentun is no argument of SGD; did you mean",
        ),
        ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1}}}, "max_grad_norm is no argument"),
        (
            {"scheduler": {"type": "WarmupLL", "params": {}}},
            "torch's; did you mean 'WarmupLR'?",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.params is missing"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}}, "warmup_steps is no argument of WarmupLR"),
        ({"wandb": {"enabled": True}}, "wandb.enabled needs the package wandb: pip install wandb"),
        ({"wandb": {"enabld": True}}, "'wandb.enabld'; did you mean 'enabled'?"),
    ],
)
def test_what_deepspeed_refuses_is_one_line_with_file_and_key(
    tmp_path: Path, config: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_check, "_is_installed", lambda package: False)
    with pytest.raises(UserError) as error:
        ds_config.resolve(options(deepspeed_config=write(tmp_path, config)), 1, "cpu")
    assert message in str(error.value) and "mine.json" in str(error.value) and "\n" not in str(error.value)


def test_a_key_given_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 1, "stage": 2}}')
    with pytest.raises(UserError, match="mine.json is not valid JSON: the key 'stage' is given twice"):
        ds_config.load(str(tmp_path / "mine.json"))


@pytest.mark.parametrize(
    ("config", "notes"),
    [
        (
            {"gradient_cliping": 1.0},
            ["DeepSpeed ignores 'gradient_cliping', which it does not know; did"],
        ),
        ({"sequence_parallel_size": 1, "log_level": "info", "train_batch_size": 8}, []),
        ({"wandb": {"enabled": False, "project": "7"}, "gradient_clipping": "auto"}, []),
        ({"optimizer": {"type": "Adam", "params": {"torch_adam": True, "lr": 1, "bias_correction": False}}}, []),
        ({"scheduler": {"type": "StepLR", "params": {"step_size": 3}}}, []),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.1}}}, []),
        (
            {"scheduler": {"type": "WarmupLR", "params": {}}},
            ["DeepSpeed's WarmupLR has a learning rate of 0"],
        ),
        (
            {"zero_optimization": {**ZERO2, "cpu_offload": True}},
            ["cpu_offload is read as offload_optimizer"],
        ),
    ],
)
def test_unexpected_effects_are_noted(tmp_path: Path, config: Any, notes: list[str]) -> None:
    resolved = ds_config.resolve(options(deepspeed_config=write(tmp_path, config)), 1, "cpu")
    ds_config.check_trainable(resolved)
    assert len(resolved.notes) == len(notes)
    assert all(expected in note for expected, note in zip(notes, resolved.notes, strict=True))


@pytest.mark.parametrize("name", ds_config.shipped())
def test_shipped_configs_pass_deepspeeds_check(name: str) -> None:
    """They are not checked at start, so that an evaluation needs no DeepSpeed."""
    assert check_config(ds_config.load(name), name) == []


def test_old_keys_of_offload_are_translated(tmp_path: Path) -> None:
    old = {"stage": 3, "cpu_offload": True, "cpu_offload_param": False}
    config = ds_config.load(write(tmp_path, {"zero_optimization": old, "optimizer": {"type": "Adam"}}))
    assert config["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert compiled_ops.needed_operators(config) == ["cpu_adam"]


@pytest.mark.parametrize(
    ("config", "given", "micro", "accumulation"),
    [
        ({"train_batch_size": 24}, {}, 12, 1),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 3}, {}, 4, 3),
        ({"train_batch_size": 24}, {"gradient_accumulation_steps": 2}, 6, 2),
        ({"train_batch_size": 24}, {"per_gpu_train_batch_size": 3}, 3, 4),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": "auto"}, {}, 8, 2),
    ],
)
def test_the_micro_batch_follows_from_train_batch_size_alone(
    tmp_path: Path, config: Any, given: Any, micro: int, accumulation: int
) -> None:
    """As DeepSpeed derives it; on two ranks."""
    plan = ds_config.resolve(options(deepspeed_config=write(tmp_path, config), **given), 2, "cpu").plan
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps) == (micro, accumulation)


def test_a_train_batch_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mine.json: train_batch_size 5 does not divide into 2 parts"):
        ds_config.resolve(options(deepspeed_config=write(tmp_path, {"train_batch_size": 5})), 2, "cpu")


def test_sequence_parallelism_is_refused_in_training(tmp_path: Path) -> None:
    resolved = ds_config.resolve(options(deepspeed_config=write(tmp_path, {"sequence_parallel_size": 2})), 2, "cpu")
    with pytest.raises(UserError, match="sequence_parallel_size 2 is not supported: each rank trains on its own rows"):
        ds_config.check_trainable(resolved)


@pytest.mark.parametrize("asked", [{"writer": {"type": "fast", "decoupled": True}}, {"load_universal": True}])
def test_other_ways_to_save_are_refused_in_training(tmp_path: Path, asked: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"checkpoint": asked}))
    resolved = ds_config.resolve(options(deepspeed_config=str(tmp_path / "config.json")), 1, "cpu")
    with pytest.raises(UserError, match=f"checkpoint.{next(iter(asked))} is not supported by"):
        ds_config.check_trainable(resolved)


def test_float16_at_stage_0_is_refused_in_training() -> None:
    with pytest.raises(UserError, match="use --deepspeed_config zero1"):
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


def test_missing_tools_for_an_operator_are_reported_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = {"optimizer": {"type": "AdamW"}}
    with pytest.raises(UserError, match="no no-such-compiler; install it, or leave the optimizer section out"):
        compiled_ops.require(config)
    monkeypatch.setenv("CXX", "sh")
    assert compiled_ops.require(config) == ["fused_adam"]
    assert compiled_ops.needed_operators(ds_config.load("zero3_nvme")) == []
    quantized = ds_config.resolve(options(deepspeed_config="zero3_zeropp"), 2, "cuda").config
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="quantizer compiled, and there is no nvcc; install it, or take the lines"):
        compiled_ops.require(quantized)


def test_the_secondary_partition_is_that_of_a_host(tmp_path: Path) -> None:
    """Of ZeRO++; on a single host there is none."""
    zeropp = ds_config.load("zero3_zeropp")["zero_optimization"]
    secondary = {name: value for name, value in zeropp.items() if "quantized" not in name}
    name = write(tmp_path, {"zero_optimization": secondary})
    resolved = ds_config.resolve(options(deepspeed_config=name), 8, "cpu")
    ds_config.check_trainable(resolved)
    for ranks_of_host, size in ((4, 4), (8, 1), (1, 1)):
        zero = ds_config.finish(resolved, 1, 8, ranks_of_host)["zero_optimization"]
        assert zero["zero_hpz_partition_size"] == size
    name = write(tmp_path, {"zero_optimization": {**secondary, "zero_hpz_partition_size": 3}})
    with pytest.raises(UserError, match="zero_hpz_partition_size 3 does not divide 8 ranks"):
        ds_config.check_trainable(ds_config.resolve(options(deepspeed_config=name), 8, "cpu"))
