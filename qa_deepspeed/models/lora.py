"""LoRA (Hu et al. 2021): low-rank adapters beside frozen weights, by peft and in its file format.

Adapters are injected into the Transformers model, which keeps its class and its forward; the question-answering head is
trained in full.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.transformers_compat import (
    ADAPTER,
    NAME_PREFIX,
    adapted_names,
    adapter_layers,
    check_peft_supported,
    name_in_adapter_file,
)
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import apply_umask
from qa_deepspeed.utils.json_files import DamagedFile, read_json
from qa_deepspeed.utils.progress import write_progress

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Settings of adapters. target_modules: names of modules, or all linear ones except the head's."""

    rank: int
    alpha: int
    dropout: float
    target_modules: tuple[str, ...]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> LoraSettings | None:
        """The settings in a run's options by name; None for a run that trains all weights (or an old run's options).

        Raises:
            UserError: numbers out of range.
        """
        rank = options.get("lora_rank")
        if rank is None:
            return None
        if rank < 1 or options["lora_alpha"] < 1 or not 0 <= options["lora_dropout"] < 1:
            raise UserError("lora_rank and lora_alpha must be at least 1, lora_dropout at least 0 and less than 1")
        names = tuple(name.strip() for name in options["lora_target_modules"].split(",") if name.strip())
        if not names:
            raise UserError(f"lora_target_modules names no module: pass names separated by commas, or {ALL_LINEAR}")
        return cls(rank, options["lora_alpha"], options["lora_dropout"], names)


def check_lora(options: RunOptions) -> None:
    """Check LoRA's options before a training run.

    Raises:
        UserError: they are invalid, or given without a rank, or the run would start from an adapter.
    """
    settings = LoraSettings.of(options.to_dict())
    given = sorted(name for name in options.given if name.startswith("lora_"))
    if settings is not None:
        require_peft()
    elif given:
        raise UserError(f"{', '.join(given)} without --lora_rank: pass a rank, such as 8, or leave them out")
    if base_of(options.model_name_or_path):
        raise UserError(
            f"{options.model_name_or_path} holds a LoRA adapter, which cannot be trained further: start from "
            "its base model, or merge a checkpoint first (qa-deepspeed export --merge_lora)"
        )


def require_peft() -> Any:
    """The peft package.

    Raises:
        UserError: it is not installed, or of a version that is not supported.
    """
    try:
        import peft
    except ImportError:
        raise UserError("LoRA adapters need peft, which is not installed: pip install 'qa_deepspeed[lora]'") from None
    check_peft_supported()
    return peft


def head_names(model: Any) -> list[str]:
    """Names of the modules of the question-answering head, which are all modules outside of the base model."""
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and next(child.parameters(), None) is not None
    ]


def add_adapters(model: Any, settings: LoraSettings, base: str, seed: int) -> Any:
    """Inject new adapters into `model`, whose weights come from `base`; only they and the head are trained then.

    Returns peft's tuner, which can merge the adapters into the weights. The saved config names the model's class, not
    peft's task type: peft's wrapper for question answering drops token_type_ids (peft 0.21), its general one does not.

    Raises:
        UserError: peft is not installed, or the model has none of the named modules.
    """
    peft = require_peft()
    heads = head_names(model)
    targets = ALL_LINEAR if settings.target_modules == (ALL_LINEAR,) else list(settings.target_modules)
    config = peft.LoraConfig(
        auto_mapping={"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        exclude_modules=rf"({'|'.join(heads)})(\..*)?",
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else base,
    )
    torch.manual_seed(seed)  # the generator's state differs between ZeRO stages
    tuner = _inject(model, config, f"lora_target_modules {','.join(settings.target_modules)}")
    config.target_modules, config.exclude_modules = adapted_names(tuner), None
    config.modules_to_save = heads  # for loading by peft; here the head needs no wrapper
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in heads:
            parameter.requires_grad_(True)
    return tuner


def _inject(model: Any, config: Any, what: str) -> Any:
    try:
        return require_peft().LoraModel(model, config, ADAPTER)
    except ValueError as error:
        known = sorted({name.split(".")[-1] for name, part in model.named_modules() if hasattr(part, "weight")})
        reason = str(error).split(". ")[0].splitlines()[0]
        raise UserError(f"{what}: {reason}; the model has {', '.join(known)}") from None


def has_adapters(model: Any) -> bool:
    """Whether the model has adapters."""
    return ADAPTER in getattr(model, "peft_config", {})


def adapted_modules(model: Any) -> list[Any]:
    """The modules with adapters."""
    return adapter_layers(model) if has_adapters(model) else []


def save_weights(folder: Path, model: Any, state: Mapping[str, torch.Tensor], **how: Any) -> Mapping[str, torch.Tensor]:
    """Write the model with the full state dict `state` into `folder`; returns the tensors in its files, by name.

    A model without adapters is written by Transformers, with `how` for its `save_pretrained`. Of a model with adapters,
    these and the head are written as `PeftModel.from_pretrained` reads them, and the config, for a tuned threshold.
    """
    if not has_adapters(model):
        size = sum({value.data_ptr(): value.nbytes for value in state.values()}.values())  # shared tensors count once
        with write_progress("saving the model", folder, size):
            model.save_pretrained(folder, state_dict=dict(state), **how)
        for path in folder.glob("*.safetensors"):
            apply_umask(path)
        return state
    folder.mkdir(parents=True, exist_ok=True)
    saved = {name: value.detach().cpu().contiguous() for name, value in adapter_state(model, state).items()}
    save_file(saved, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    apply_umask(folder / WEIGHTS_FILE)
    dataclasses.replace(model.peft_config[ADAPTER], inference_mode=True).save_pretrained(folder)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    return saved


def load_by_peft(folder: Path, kind: Any, dtype: torch.dtype) -> tuple[Any, dict[str, torch.Tensor]]:
    """The adapter in `folder` on its base model of the Transformers class `kind`, loaded by peft alone: the model, and
    the adapter's tensors by their names in files."""
    peft = require_peft()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    base = kind.from_pretrained(base_of(str(folder)), config=config, dtype=dtype)
    wrapped = peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    return wrapped.eval(), peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)


def adapter_state(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapters and the head of a state dict, by the names of peft's files."""
    heads = head_names(model)
    found = require_peft().get_peft_model_state_dict(model, state_dict=dict(state), save_embedding_layers=False)
    found |= {name: value for name, value in state.items() if name.split(".")[0] in heads}
    return {NAME_PREFIX + name: value for name, value in found.items()}


def base_of(name: str | None) -> str | None:
    """The base model of the adapter in the folder `name`; None if it holds no adapter.

    Raises:
        UserError: its config cannot be read, it is of another kind than LoRA, or the base model's folder is missing.
    """
    if not name or not (Path(name) / CONFIG_FILE).is_file():
        return None
    try:
        config = read_json(Path(name) / CONFIG_FILE, {"peft_type": str, "base_model_name_or_path": str})
    except DamagedFile as error:
        raise UserError(f"{error}: the adapter cannot be read") from None
    kind, base = config["peft_type"], str(config["base_model_name_or_path"])
    if kind != "LORA":
        raise UserError(f"{name} holds an adapter of the kind {kind}: only LORA is supported")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(
            f"the adapter in {name} was trained on {base}, which does not exist: put the base model there, "
            f"or its path into {CONFIG_FILE}"
        )
    return base


def load_adapters(model: Any, name: str, fill: Callable[[torch.Tensor, torch.Tensor], None]) -> list[str]:
    """Load the adapters and the head in the folder `name` into its base model; returns the names of their parameters.

    Args:
        fill: sets a parameter of the model to its full value.
    Raises:
        UserError: the adapter is not for this model, or its weights are missing.
    """
    peft = require_peft()
    try:
        saved = load_file(Path(name) / WEIGHTS_FILE)
    except OSError as error:
        raise UserError(f"{Path(name) / WEIGHTS_FILE} cannot be read ({error})") from None
    config = peft.LoraConfig.from_pretrained(name)
    config.modules_to_save = None
    _inject(model, config, f"the adapter in {name} does not fit its base model")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters = dict(model.named_parameters())
    names = {name_in_adapter_file(own): own for own in parameters}
    wanted = {name_in_adapter_file(own) for own in parameters if f".{ADAPTER}." in own}
    unknown = sorted(set(saved) - set(names)) or sorted(wanted - set(saved))
    if unknown:
        raise UserError(f"the adapter in {name} does not fit its base model: {', '.join(unknown[:3])} ...")
    for stored, value in saved.items():
        fill(parameters[names[stored]], value)
    return [names[stored] for stored in saved]
