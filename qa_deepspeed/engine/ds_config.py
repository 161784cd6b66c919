"""DeepSpeed configs: found by name or path, checked against the options, and every "auto" filled.

As in transformers.Trainer, `"auto"` is a number that the command line owns. A number of the config counts if the
command line does not give it; if both give it and differ, the run ends with an error before any model is loaded, with
all conflicts and both owners in one message.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa_deepspeed.config.batch_plan import BatchPlan, plan_batches
from qa_deepspeed.config.options import nearest
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.compiled_ops import quantizes_messages
from qa_deepspeed.engine.config_check import AUTO, check_config
from qa_deepspeed.engine.monitors import fill_monitors
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError

STAND_IN = "zero2"
"""Config by which a run that names none is checked, until `config_choice.choose_config` chooses."""

SECTIONS = ("zero_optimization", "optimizer", "scheduler", "bf16", "fp16", "torch_autocast", "checkpoint")
"""Keys that are looked into here, and must hold a JSON object."""

OLD_OFFLOAD = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
"""Old keys of zero_optimization -> sections that replace them."""

OWNER_OF = {
    "train_micro_batch_size_per_gpu": "per_gpu_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_batch_size": "global_batch_size",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "scheduler.params.warmup_num_steps": "warmup_steps",
    "scheduler.params.total_num_steps": "max_steps",
    "zero_optimization.offload_optimizer.nvme_path": "nvme_path",
    "zero_optimization.offload_param.nvme_path": "nvme_path",
}
"""Config key -> option that owns it, for the numbers that both can give."""

PRECISIONS = ("bf16", "fp16", "torch_autocast")
"""Config sections whose `enabled` selects a precision; with none of them it is float32."""


@dataclass(frozen=True)
class ResolvedConfig:
    """A config with every `"auto"` filled that is known before the data is read, and the options that match it."""

    config: dict[str, Any]
    options: RunOptions
    plan: BatchPlan
    name: str
    notes: tuple[str, ...] = ()
    """Phrases about this config that the user should read."""

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return int(self.config.get("zero_optimization", {}).get("stage", 0))

    @property
    def precision(self) -> str:
        """`fp32`, or the name of the enabled section."""
        return next((name for name in PRECISIONS if self.config.get(name, {}).get("enabled")), "fp32")


def shipped() -> dict[str, Path]:
    """The configs of this package by name, in an installed wheel or in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "ds_configs", package.parent / "ds_configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.json"))}
    raise UserError(f"the shipped ds_configs are missing beside {package}; install qa_deepspeed again")


def load(name: str) -> dict[str, Any]:
    """Read the config `name`, a shipped name or a path; old keys for offload become today's.

    Raises:
        UserError: no such config (the nearest shipped name is given), not a JSON object, or a key twice.
    """
    return _load(name)[0]


def _load(name: str) -> tuple[dict[str, Any], list[str]]:
    """The config, and a phrase for each old key."""
    known = shipped()
    path = known.get(name.removesuffix(".json"), Path(name))
    if not path.is_file():
        raise UserError(
            f"deepspeed_config '{name}' is neither a file nor a shipped config ({', '.join(known)})"
            + nearest(name, known)
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise UserError(f"deepspeed_config {path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"deepspeed_config {path} must hold a JSON object")
    flat = [name for name in SECTIONS if name in config and not isinstance(config[name], dict)]
    if flat:
        raise UserError(f"deepspeed_config {path}: {', '.join(flat)} must hold a JSON object")
    zero, notes = config.get("zero_optimization", {}), []
    old_keys = [old for old, new in OLD_OFFLOAD.items() if isinstance(zero.get(old), bool) and new not in zero]
    for old in old_keys:
        if zero.pop(old):
            zero[OLD_OFFLOAD[old]] = {"device": "cpu"}
            notes.append(f'{path}: {old} is read as {OLD_OFFLOAD[old]}: {{"device": "cpu"}}')
    return config, notes


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError if it has a key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' is given twice")
    return found


def resolve(
    options: RunOptions, world_size: int, device_type: str, bf16_supported: bool = True, default: str = STAND_IN
) -> ResolvedConfig:
    """Merge config and options, and derive the batch arithmetic. `default` is the config of a run that names none, or
    "auto".

    A config that is not shipped is checked by DeepSpeed, which is imported for that.

    Raises:
        UserError: DeepSpeed refuses the config; config and command line disagree, with all conflicts in one message;
            batch sizes do not divide; the device does not support the precision.
    """
    name = default if chooses_config(options) else str(options.deepspeed_config)
    config, notes = _load(name)
    if name.removesuffix(".json") not in shipped():
        notes += check_config(config, name)
    conflicts: list[str] = []
    precision = _precision_asked(options, config, device_type, bf16_supported)
    _set_precision(config, precision, name, conflicts)
    if config.get("torch_autocast", {}).get("enabled"):
        config["torch_autocast"].setdefault("dtype", "bfloat16" if bf16_supported else "float16")
    options = _agree_numbers(config, options, name, conflicts)
    fill_monitors(config, options, name, conflicts)
    if conflicts:
        raise UserError(
            f"{name} and the command line disagree: {'; '.join(conflicts)}. Give each in one place only, "
            'or put "auto" into the config'
        )
    options = _derive_micro_batch(config, options, name, world_size)
    resolved = ResolvedConfig(config, options, _plan(options, world_size), name, tuple(notes))
    if resolved.precision == "fp16" and device_type == "cpu":
        raise UserError("fp16 does not run on a CPU: use --bf16, or leave --fp16 out for float32")
    attention = options.attn_implementation or ""
    if attention.startswith("flash_attention") and (device_type == "cpu" or resolved.precision == "fp32"):
        raise UserError(
            f"{attention} computes in half precision on GPUs: leave --attn_implementation out, or use --bf16 on a GPU"
        )
    if device_type == "cpu" and quantizes_messages(config):
        raise UserError(
            f"{name}: the quantized messages of ZeRO++ need GPUs: use zero3, or a copy of the config without the lines "
            "zero_quantized_..., whose secondary partition works on CPUs"
        )
    return resolved


def chooses_config(options: RunOptions) -> bool:
    """Whether the run leaves the choice of its config to this program."""
    return options.deepspeed_config in (None, AUTO)


def check_trainable(resolved: ResolvedConfig) -> None:
    """Raises UserError for settings that DeepSpeed 0.19.8 accepts but trains or saves wrongly, and for NVMe without a
    folder.

    In float16 at stage 0 it divides gradients by a loss scale that the loss was not multiplied by: seen on a GPU, where
    the loss hardly fell (DeepSpeedEngine.backward scales for ZeRO's optimizers only). Its writers in the background do
    not work here, see engine/checkpoints/checkpoint.py.
    """
    if resolved.config.get("sequence_parallel_size", 1) != 1:
        raise UserError(
            f"{resolved.name}: sequence_parallel_size {resolved.config['sequence_parallel_size']} is not supported: "
            "each rank trains on its own rows; take it out, or set it to 1"
        )
    for key in ("writer", "load_universal"):
        if resolved.config.get("checkpoint", {}).get(key):
            raise UserError(
                f"{resolved.name}: checkpoint.{key} is not supported by this trainer's checkpoints, which are "
                "complete or absent, and load at any world size without conversion: take it out"
            )
    if resolved.precision == "fp16" and resolved.zero_stage == 0:
        raise UserError(
            "fp16 at ZeRO stage 0 trains wrongly in this version of DeepSpeed (gradients are divided by the loss "
            "scale, but the loss is not multiplied by it): use --deepspeed_config zero1 or zero2, or --bf16"
        )
    require_nvme_path(resolved)


def require_nvme_path(resolved: ResolvedConfig) -> None:
    """Raises UserError if the config keeps state on NVMe in a folder that is missing or cannot be written."""
    zero = resolved.config.get("zero_optimization", {})
    secondary, ranks = zero.get("zero_hpz_partition_size", 1), resolved.plan.world_size
    if secondary != AUTO and secondary < ranks and ranks % max(1, secondary):
        raise UserError(
            f"{resolved.name}: zero_hpz_partition_size {secondary} does not divide {ranks} ranks: put the number of "
            'ranks of a host there, or "auto"'
        )
    for key in ("offload_optimizer", "offload_param"):
        section = zero.get(key) or {}
        path = section.get("nvme_path")
        if section.get("device") == "nvme" and not (path and os.path.isdir(path) and os.access(path, os.W_OK)):
            raise UserError(
                f"{resolved.name} keeps state on NVMe: pass --nvme_path, a folder there that can be written, not {path}"
            )


def finish(
    resolved: ResolvedConfig, total_steps: int, hidden_size: int, ranks_of_host: int | None = None
) -> dict[str, Any]:
    """The config for DeepSpeed: every remaining `"auto"` filled from the run and the model.

    Bucket sizes follow the model's hidden size by the rules of transformers' DeepSpeed integration
    (`trainer_config_finalize` in transformers/integrations/deepspeed.py). The ranks of a host keep a secondary
    partition (ZeRO++) between them; on a single host it would be a copy of the first.

    Args:
        ranks_of_host: those of this process's host unless given.

    Raises:
        UserError: an `"auto"` that nobody owns.
    """
    config, options, plan = copy.deepcopy(resolved.config), resolved.options, resolved.plan
    on_host = dist.local_world_size() if ranks_of_host is None else ranks_of_host
    config["train_micro_batch_size_per_gpu"] = plan.micro_batch_size
    config["gradient_accumulation_steps"] = plan.gradient_accumulation_steps
    config["train_batch_size"] = plan.global_batch_size
    config.setdefault("gradient_clipping", options.max_grad_norm)
    config.setdefault("steps_per_print", sys.maxsize)
    if resolved.precision == "bf16":
        # thousands of small operators and a synchronization in every step; training/nonfinite_loss.py checks instead
        config["bf16"].setdefault("check_grad_overflow", False)
    if "optimizer" not in config and "offload_optimizer" in config.get("zero_optimization", {}):
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    filled = {
        "optimizer.params.betas": [0.9, 0.999],
        "scheduler.params.warmup_min_lr": 0,
        "scheduler.params.warmup_num_steps": max(1, options.warmup_steps),
        "scheduler.params.total_num_steps": total_steps,
        "zero_optimization.reduce_bucket_size": hidden_size * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
        "zero_optimization.zero_hpz_partition_size": on_host if on_host < plan.world_size else 1,
    }
    for key, parent, leaf in list(_leaves(config)):
        if parent[leaf] == AUTO and key in filled:
            parent[leaf] = filled[key]
    left = [key for key, parent, leaf in _leaves(config) if parent[leaf] == AUTO]
    if left:
        raise UserError(f'{resolved.name}: no option fills the "auto" of {", ".join(left)}; put a value there')
    return config


def section_in_words(config: dict[str, Any], section: str) -> str:
    """The `optimizer` or `scheduler` of a config as text, with those of its parameters that no option owns; "default"
    if it has none."""
    named = config.get(section)
    if not named:
        return "default"
    own = {
        name: value
        for name, value in sorted(named.get("params", {}).items())
        if f"{section}.params.{name}" not in OWNER_OF and value != AUTO
    }
    return f"{named.get('type')} {json.dumps(own)}" if own else str(named.get("type"))


def hidden_size(model_config: Any) -> int:
    """The width by which bucket sizes are set, under any of its names; 768 for a config without one."""
    for name in ("hidden_size", "d_model", "dim", "n_embd"):
        width = getattr(model_config, name, None)
        if isinstance(width, int):
            return width
    return 768


def _agree_numbers(config: dict[str, Any], options: RunOptions, name: str, conflicts: list[str]) -> RunOptions:
    """Fill the config's `"auto"`s from the options; adopt the numbers that only the config gives."""
    adopted: dict[str, Any] = {}
    for key, parent, leaf in list(_leaves(config)):
        owner = OWNER_OF.get(key)
        if owner is None:
            continue
        value, option = parent[leaf], getattr(options, owner)
        if value == AUTO:
            if key not in ("train_batch_size", "scheduler.params.warmup_num_steps", "scheduler.params.total_num_steps"):
                parent[leaf] = option
        elif owner in options.given and value != option:
            conflicts.append(f"{key} is {value} in {name}, {owner} is {option} on the command line")
        elif owner in adopted and adopted[owner] != value:
            conflicts.append(f"{key} is {value} in {name}, another key gives {owner} {adopted[owner]}")
        else:
            adopted[owner] = value
    return dataclasses.replace(options, **adopted, given=options.given | adopted.keys())


def _derive_micro_batch(config: dict[str, Any], options: RunOptions, name: str, world_size: int) -> RunOptions:
    """Derive the micro-batch, as DeepSpeed does, if only the config's train_batch_size is given.

    Raises:
        UserError: it does not divide.
    """
    rows = config.get("train_batch_size", AUTO)
    silent = "train_micro_batch_size_per_gpu" not in config and "per_gpu_train_batch_size" not in options.given
    if rows == AUTO or not silent:
        return options
    given = "gradient_accumulation_steps" in options.given
    parts = world_size * (options.gradient_accumulation_steps if given else 1)
    if rows % parts:
        raise UserError(
            f"{name}: train_batch_size {rows} does not divide into {parts} parts ({world_size} ranks x accumulation "
            f"steps): use a multiple of {parts}, or give train_micro_batch_size_per_gpu too"
        )
    adopted = options.given | {"per_gpu_train_batch_size"}
    return dataclasses.replace(options, per_gpu_train_batch_size=rows // parts, given=adopted)


def _plan(options: RunOptions, world_size: int) -> BatchPlan:
    def if_given(name: str) -> int | None:
        return getattr(options, name) if name in options.given else None

    return plan_batches(
        options.per_gpu_train_batch_size, if_given("gradient_accumulation_steps"), options.global_batch_size, world_size
    )


def _precision_asked(options: RunOptions, config: dict[str, Any], device_type: str, bf16_supported: bool) -> str | None:
    """The precision that the command line asks for, None if it does not; apex levels become precisions."""
    level = options.fp16_opt_level
    if options.bf16 and (options.fp16 or level in ("O1", "O2")):
        raise UserError("--bf16 and --fp16 exclude each other: use one")
    if level not in (None, "O0", "O1", "O2"):
        raise UserError(f"fp16_opt_level {level} is not supported: use O0 (float32), O1 (torch_autocast) or O2 (fp16)")
    if level == "O1":
        stage = config.get("zero_optimization", {}).get("stage", 0)
        if not bf16_supported and stage != 0:
            raise UserError(
                "fp16_opt_level O1 with float16 is correct at ZeRO stage 0 only: use --deepspeed_config "
                "zero0, or --fp16 alone"
            )
        return "torch_autocast"
    if level == "O0":
        return "fp32"
    if options.bf16:
        return "bf16"
    return "fp16" if options.fp16 or level == "O2" else None


def _set_precision(config: dict[str, Any], asked: str | None, name: str, conflicts: list[str]) -> None:
    """Set the requested precision in the config's sections; a section with another value is a conflict."""
    for section in PRECISIONS:
        wanted = section == asked
        if section not in config:
            if wanted:
                config[section] = {"enabled": True}
            continue
        settings = config[section]
        enabled = settings.get("enabled", AUTO)
        if enabled == AUTO:
            settings["enabled"] = wanted
        elif asked is not None and bool(enabled) != wanted:
            conflicts.append(
                f"{section}.enabled is {str(enabled).lower()} in {name}, the command line asks for {asked}"
            )


def _leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every value of the nested config as (dotted key, dict that holds it, key in that dict)."""
    for leaf, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{leaf}.")
        else:
            yield f"{prefix}{leaf}", config, leaf
