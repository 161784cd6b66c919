"""Check of a DeepSpeed config by DeepSpeed's own classes, before anything is loaded.

DeepSpeed parses the config here as it does when training starts, so that its complaints come early and in one line.
Keys that it never looks at are reported: it ignores them silently, misspelt ones too.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import pydantic
import torch

from qa_deepspeed.config.options import nearest
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.supported import require_names

NAMES = {
    "deepspeed.runtime.config": "DeepSpeedConfig DeepSpeedConfigError DEEPSPEED_OPTIMIZERS",
    "deepspeed.runtime.config_utils": "DeepSpeedConfigModel",
    "deepspeed.runtime.constants": "",
    "deepspeed.runtime.lr_schedules": "",
    "deepspeed.ops.adam": "FusedAdam DeepSpeedCPUAdam",
    "deepspeed.ops.lion": "FusedLion DeepSpeedCPULion",
    "deepspeed.ops.adagrad": "DeepSpeedCPUAdagrad",
    "deepspeed.ops.lamb": "FusedLamb",
}
"""Names of DeepSpeed in use: module -> names in it."""

AUTO = "auto"
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

ADAM = (
    ("deepspeed.ops.adam", "FusedAdam"),
    ("deepspeed.ops.adam", "DeepSpeedCPUAdam"),
    ("torch.optim", "Adam"),
    ("torch.optim", "AdamW"),
)
OPTIMIZERS = {
    "adam": ADAM,
    "adamw": ADAM,
    "lamb": (("deepspeed.ops.lamb", "FusedLamb"),),
    "lion": (("deepspeed.ops.lion", "FusedLion"), ("deepspeed.ops.lion", "DeepSpeedCPULion")),
    "adagrad": (("torch.optim", "Adagrad"), ("deepspeed.ops.adagrad", "DeepSpeedCPUAdagrad")),
}
"""DeepSpeed's name of an optimizer -> classes of which it takes one. DeepSpeed alone checks Muon's."""

ADAM_SWITCHES = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")
"""Arguments of an Adam that DeepSpeed takes out before it makes the optimizer."""

PACKAGE_OF = {"wandb": "wandb", "comet": "comet_ml", "tensorboard": "tensorboard"}
"""Section of a logger -> package that it imports."""


def check_config(config: dict[str, Any], where: str) -> list[str]:
    """Let DeepSpeed parse a config that may hold `"auto"`; `where` names it in messages. Imports DeepSpeed (2 to 3 s).

    Returns:
        One phrase for each key that DeepSpeed ignores, and for a schedule that begins with a rate of 0.
    Raises:
        UserError: DeepSpeed refuses the config, at once or when training starts; one line.
    """
    require_names("deepspeed", {place: names.split() for place, names in NAMES.items()})
    config = _without_auto(config)
    recorded = _RecordedConfig({key: value for key, value in config.items() if key not in BATCH_KEYS})
    recorded["train_micro_batch_size_per_gpu"] = 1  # good for any number of ranks; ds_config derives the batches
    problem = (
        _wrong_type(config)
        or _refusal(recorded)
        or _optimizer_problem(config.get("optimizer"))
        or _scheduler_problem(config.get("scheduler"))
        or missing_package(config)
    )
    if problem:
        raise UserError(f"deepspeed_config {where}: {problem}")
    known = {*recorded.read, *BATCH_KEYS, *_keys_of_ranks()}
    ignored = [key for key in config if key not in known]
    notes = [f"DeepSpeed ignores '{key}', which it does not know{nearest(key, known)}" for key in ignored]
    return notes + _late_start(config.get("scheduler"))


class _RecordedConfig(dict[str, Any]):
    """A config that notes which keys are looked up, the last one last."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.read: list[str] = []

    def __contains__(self, key: object) -> bool:
        self.read.append(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.read.append(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of any dictionary."""
        self.read.append(key)
        return super().get(key, default)

    def keys(self) -> Any:
        """The config itself, so that `key in config.keys()` is noted."""
        return self

    def __copy__(self) -> _RecordedConfig:
        return self


def _keys_of_ranks() -> set[str]:
    """Keys that DeepSpeed looks up only where ranks have met: texts in the code that counts the ranks."""
    code = importlib.import_module("deepspeed.runtime.config").DeepSpeedConfig.__init__.__code__
    return {text for text in code.co_consts if isinstance(text, str)}


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """A copy in which keys with the value "auto" are left out, at all levels: DeepSpeed takes its defaults there."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else copy.deepcopy(value)
        for key, value in config.items()
        if value != AUTO
    }


def _wrong_type(config: dict[str, Any]) -> str | None:
    """The first value at the top that has another type than DeepSpeed's default, or number in quotes in a section.

    DeepSpeed itself does not check the former, and reads the latter as numbers in places.
    """
    constants = vars(importlib.import_module("deepspeed.runtime.constants"))
    defaults = {text: constants.get(f"{name}_DEFAULT") for name, text in constants.items() if isinstance(text, str)}
    defaults |= dict.fromkeys((*BATCH_KEYS, "steps_per_print"), 1)
    for key, value in config.items():
        if not isinstance(value, dict) and _is_wrong(value, defaults.get(key)):
            return _describe_wrong(key, value, defaults[key])
        if key in BATCH_KEYS and value < 1:
            return f"{key} is {value}: it must be at least 1"
    sections = {name: config.get(name) for name in ("zero_optimization", "bf16", "fp16")}
    for name in ("optimizer", "scheduler"):
        sections[f"{name}.params"] = (config.get(name) or {}).get("params")
    return next((_describe_wrong(key, value, 1.0) for key, value in _quoted_numbers(sections)), None)


def _quoted_numbers(sections: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Texts that are numbers, at any depth, with their keys; names of folders may be."""
    for name, value in sections.items():
        if isinstance(value, dict):
            yield from _quoted_numbers(value, f"{prefix}{name}.")
        elif _is_quoted_number(value) and not name.endswith("path"):
            yield f"{prefix}{name}", value


def _is_wrong(value: Any, default: Any) -> bool:
    if isinstance(default, bool):
        return not isinstance(value, bool)
    if isinstance(default, (int, float)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return not number or (isinstance(default, int) and value != int(value))
    return _is_quoted_number(value)


def _is_quoted_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and float(value) is not None
    except ValueError:
        return False


def _describe_wrong(key: str, value: Any, default: Any) -> str:
    if _is_quoted_number(value):
        return f"{key} is {json.dumps(value)}, a number in quotes: remove the quotes"
    kind = "true or false" if isinstance(default, bool) else "a number" if isinstance(default, float) else "an integer"
    return f"{key} is {json.dumps(value)}: it must be {kind}"


def _refusal(recorded: _RecordedConfig) -> str | None:
    """What DeepSpeed says against a config when it parses it, with the key."""
    module = importlib.import_module("deepspeed.runtime.config")
    try:
        module.DeepSpeedConfig(recorded)
    except pydantic.ValidationError as error:
        section = recorded.read[-1]
        return "; ".join(_complaint(each, section, recorded, error.title) for each in error.errors()[:3])
    except module.DeepSpeedConfigError as error:
        return " ".join(str(error).split())
    except (ValueError, TypeError, AssertionError, AttributeError, KeyError) as error:
        return f"{recorded.read[-1]}: {' '.join(str(error).split())}"
    return None


def _complaint(error: Any, section: str, recorded: _RecordedConfig, model: str) -> str:
    """One complaint of pydantic about a section; DeepSpeed's loggers are checked all at once, by their own names."""
    path = [str(part) for part in error["loc"]]
    full = path if path and dict.__contains__(recorded, path[0]) else [section, *path]
    key = ".".join(full)
    if error["type"] == "extra_forbidden":
        return f"DeepSpeed does not know '{key}'{nearest(path[-1], _known_keys(model, path[:-1]))}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    shown = "" if isinstance(error["input"], dict) else f" is {json.dumps(error['input'], default=str)}"
    return f"{key}{shown}: {message[:1].lower()}{message[1:]}"


def _known_keys(model: str, path: list[str]) -> list[str]:
    """Keys of DeepSpeed's config class of this name, or of the section at `path` inside it."""
    waiting = [importlib.import_module("deepspeed.runtime.config_utils").DeepSpeedConfigModel]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__name__ == model:
            for part in path:
                field = next(field for name, field in kind.model_fields.items() if part in (name, field.alias))
                kind = next(each for each in (*get_args(field.annotation), field.annotation) if inspect.isclass(each))
            return [field.alias or name for name, field in kind.model_fields.items()]
    return []


def _optimizer_problem(settings: Any) -> str | None:
    """What keeps DeepSpeed from making the config's optimizer when training starts."""
    if settings is None:
        return None
    name, params = settings.get("type"), settings.get("params") or {}
    known = importlib.import_module("deepspeed.runtime.config").DEEPSPEED_OPTIMIZERS
    if not isinstance(name, str):
        return "optimizer.type is missing"
    if "max_grad_norm" in params:
        return "optimizer.params.max_grad_norm is no argument of the optimizer: use gradient_clipping"
    if name.lower() in known:
        if name.lower().startswith("mu") and name.lower() != "muon" and not _is_installed("mup"):
            return f"optimizer.type {name} needs the package mup: pip install mup"
        classes = [getattr(importlib.import_module(module), kind) for module, kind in OPTIMIZERS.get(name.lower(), ())]
        switches = ADAM_SWITCHES if name.lower() in ("adam", "adamw") else ()
        return _unknown_argument("optimizer", name, params, classes, switches)
    kind = getattr(torch.optim, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
        return f"optimizer.type {name} is neither DeepSpeed's nor torch's{nearest(name, [*known, *dir(torch.optim)])}"
    return _unknown_argument("optimizer", name, params, [kind])


def _scheduler_problem(settings: Any) -> str | None:
    """What keeps DeepSpeed from making the config's schedule when training starts."""
    if settings is None:
        return None
    name, params = settings.get("type"), settings.get("params")
    if not isinstance(name, str):
        return "scheduler.type is missing"
    theirs = importlib.import_module("deepspeed.runtime.lr_schedules")
    kind = getattr(theirs, name, None) or getattr(torch.optim.lr_scheduler, name, None)
    if not inspect.isclass(kind) or not hasattr(kind, "step"):
        known = [each for module in (theirs, torch.optim.lr_scheduler) for each in dir(module) if each[:1].isupper()]
        return f"scheduler.type {name} is neither DeepSpeed's nor torch's{nearest(name, known)}"
    if not isinstance(params, dict):
        return "scheduler.params is missing"
    return _unknown_argument("scheduler", name, params, [kind])


def _unknown_argument(
    section: str, name: str, params: dict[str, Any], classes: list[Any], switches: Iterable[str] = ()
) -> str | None:
    """The first argument that none of the classes has; None if no class is known."""
    known = {each for kind in classes for each in inspect.signature(kind).parameters} | set(switches)
    for key in params if classes else ():
        if key not in known:
            return f"{section}.params.{key} is no argument of {name}{nearest(key, known)}"
    return None


def missing_package(config: dict[str, Any]) -> str | None:
    """A monitor that is enabled and whose package is not installed, in words."""
    for section, package in PACKAGE_OF.items():
        if (config.get(section) or {}).get("enabled") and not _is_installed(package):
            return f"{section}.enabled needs the package {package}: pip install {package}"
    return None


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _late_start(settings: Any) -> list[str]:
    """DeepSpeed's warm-up begins at `warmup_min_lr`, which is 0 unless the config says otherwise."""
    if settings is None or not settings["type"].startswith("Warmup") or settings["params"].get("warmup_min_lr"):
        return []
    return [f"DeepSpeed's {settings['type']} has a learning rate of 0 in the first updates"]


REDACTED = "(redacted)"

_SECRETS = re.compile(r"(^|.*[_-])(api[_-]?key|token|secret|password|passwd|credentials?)", re.IGNORECASE)


def without_secrets(config: Any) -> Any:
    """A copy of a config, for what a run writes, in which the text of every key that names a secret is replaced."""
    if isinstance(config, list):
        return [without_secrets(value) for value in config]
    if not isinstance(config, dict):
        return config
    return {name: without_secrets(value) if not _is_secret(name, value) else REDACTED for name, value in config.items()}


def _is_secret(name: Any, value: Any) -> bool:
    return isinstance(value, str) and value != "" and _SECRETS.fullmatch(str(name)) is not None
