"""DeepSpeed's operators that a config needs compiled, and whether they can be compiled here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.home import user_cache

STALE_SECONDS = 600
"""A build's lock older than this counts as left by an interrupted build: the longest build takes a third of it."""

BUILT_OPTIMIZERS = {"adam": "adam", "adamw": "adam", "lion": "lion", "lamb": "lamb", "adagrad": "adagrad"}

WITHOUT = {"async_io": "take --deepspeed_config zero3_offload", "quantizer": "take --deepspeed_config zero3"}
"""Advice instead of compiling, for operators that do not belong to an optimizer."""


def needed_operators(config: dict[str, Any]) -> list[str]:
    """Names of the operators that DeepSpeed compiles when a run of this config starts."""
    section = config.get("optimizer")
    zero = config.get("zero_optimization", {})
    offload = (zero.get("offload_optimizer") or {}).get("device", "none")
    found = []
    if section is not None and not section.get("params", {}).get("torch_adam"):
        kind = BUILT_OPTIMIZERS.get(str(section.get("type", "")).lower())
        if kind:
            found.append(f"cpu_{kind}" if offload != "none" or kind == "adagrad" else f"fused_{kind}")
    if "nvme" in (offload, (zero.get("offload_param") or {}).get("device")):
        found.append("async_io")
    if zero.get("zero_quantized_weights") or zero.get("zero_quantized_gradients"):
        found.append("quantizer")
    return found


def require(config: dict[str, Any]) -> list[str]:
    """The operators that a run of this config compiles when it starts.

    Raises:
        UserError: one cannot be compiled or loaded.
    """
    operators = needed_operators(config)
    found = faults(operators)
    if found:
        raise UserError("; ".join(found))
    return operators


def faults(operators: list[str]) -> list[str]:
    """Why operators cannot be compiled or loaded, one line each; empty if they can."""
    found = []
    root = extensions_folder()
    for name in operators:
        lock = root / name / "lock"
        age = time.time() - lock.stat().st_mtime if lock.exists() else 0
        if age > STALE_SECONDS:
            found.append(
                f"{lock} is {age / 60:.0f} minutes old: a build was interrupted, and every run waits for it; rm {lock}"
            )
        if (root / name / f"{name}.so").exists() or _came_with_deepspeed(name):
            continue
        compiler = "nvcc" if name == "quantizer" else os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            found.append(
                f"the config needs the operator {name} compiled, and there is no {compiler}; install it, or "
                f"{WITHOUT.get(name, 'leave the optimizer section out of the config')}"
            )
        if name == "async_io" and not any((Path(folder) / "libaio.h").exists() for folder in _header_folders()):
            found.append(
                "the operator async_io is built with libaio, whose headers are not installed; apt install "
                f"libaio-dev, or {WITHOUT[name]}"
            )
        if not _has_ninja():
            found.append(f"the operator {name} is built by ninja, which is not installed; pip install ninja")
    return found


def _came_with_deepspeed(name: str) -> bool:
    """Whether DeepSpeed was installed with this operator compiled (DS_BUILD_OPS), without importing it."""
    found = importlib.util.find_spec("deepspeed")
    places = found.submodule_search_locations if found is not None else None
    return any(any(Path(place).glob(f"ops/**/{name}_op*.so")) for place in places or ())


def _header_folders() -> list[str]:
    return ["/usr/include", "/usr/local/include", *os.environ.get("CPATH", "").split(os.pathsep)]


def _has_ninja() -> bool:
    beside = Path(sys.executable).parent / "ninja"
    return shutil.which("ninja") is not None or beside.exists()


def extensions_folder() -> Path:
    """The folder of torch's compiled extensions, by the rule of torch.utils.cpp_extension."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named:
        return Path(named)
    cuda = "cpu" if torch.version.cuda is None else "cu" + torch.version.cuda.replace(".", "")
    version = f"py{sys.version_info.major}{sys.version_info.minor}_{cuda}"
    return user_cache() / "torch_extensions" / version
