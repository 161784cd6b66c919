"""Swap files of a run whose state is on NVMe: a folder of its own below `nvme_path`, which is gone when the run ends.

DeepSpeed names swap files by rank and parameter only, so that two runs with one `nvme_path` would write to the same
files, and it leaves them behind.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qa_deepspeed.engine.ds_config import ResolvedConfig, require_nvme_path
from qa_deepspeed.engine.nvme import nvme_compat
from qa_deepspeed.engine.nvme.swap_io import SwapIO
from qa_deepspeed.models.footprint import Footprint
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.units import gib

OFFLOADS = ("offload_optimizer", "offload_param")
"""Sections of zero_optimization that may name an NVMe disk."""


def nvme_folders(config: dict[str, Any]) -> dict[str, str]:
    """Section -> folder in which a config keeps its state on NVMe; an empty name where the config names none."""
    sections = {key: config.get("zero_optimization", {}).get(key) or {} for key in OFFLOADS}
    return {key: one.get("nvme_path") or "" for key, one in sections.items() if one.get("device") == "nvme"}


def swap_bytes(config: dict[str, Any], model: Footprint, element: int) -> dict[str, int]:
    """Folder -> most bytes of the swap files of all ranks in it; tensors below 1 MiB stay in memory.

    Of a trained parameter these are float32: its value, Adam's two moments, the gradient.

    Args:
        element: bytes of one number of a parameter.
    """
    sizes = {"offload_optimizer": 16 * model.trained, "offload_param": element * model.parameters}
    found: dict[str, int] = {}
    for key, folder in nvme_folders(config).items():
        found[folder] = found.get(folder, 0) + sizes[key]
    return found


@contextlib.contextmanager
def own_swap_folder(resolved: ResolvedConfig, output_dir: Path, purpose: str = "train") -> Iterator[ResolvedConfig]:
    """Inside, the config keeps its state in a fresh folder of this run and rank; nothing changes without NVMe. What an
    earlier run of the same output folder left there, since it was killed, is removed. Collective at its begin.

    Args:
        purpose: a run and an evaluation of its folder at the same time have swap files of their own.

    Raises:
        UserError: the folder cannot be written.
        StorageError: swap files cannot be written or read.
    """
    require_nvme_path(resolved)
    bases = set(nvme_folders(resolved.config).values())
    if not bases:
        yield resolved
        return
    nvme_compat.check_supported()
    folders = {base: _folder_of_run(base, output_dir, purpose) / f"rank{dist.rank()}" for base in bases}
    for folder in folders.values():
        _make_fresh(folder)
    try:
        with swap_errors(resolved), nvme_compat.swap_files_by(SwapIO), nvme_compat.parameters_read_once():
            yield _with_paths(resolved, {base: str(folder) for base, folder in folders.items()})
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # other ranks still have files in it
                folder.parent.rmdir()


@contextlib.contextmanager
def swap_errors(resolved: ResolvedConfig) -> Iterator[None]:
    """Inside, a lack of buffers for swap files is an error of one line.

    Raises:
        UserError: in place of DeepSpeed's assertion.
    """
    try:
        yield
    except AssertionError as error:
        if not nvme_compat.is_lack_of_buffers(error):
            raise
        raise UserError(
            f"{resolved.name}: {error} (buffer_size and buffer_count of the config's offload sections)"
        ) from None


def _folder_of_run(base: str, output_dir: Path, purpose: str) -> Path:
    """A name that the next start with the same output folder finds again."""
    digest = hashlib.sha256(os.fsencode(output_dir.resolve())).hexdigest()[:12]
    return Path(base) / f"qa_deepspeed-{purpose}-{digest}"


def _make_fresh(folder: Path) -> None:
    """Make this rank's folder; one rank of each disk removes what is there before. All ranks raise, or none."""
    run = folder.parent
    if dist.is_first_on_filesystem(run.parent) and run.exists():
        size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
        shutil.rmtree(run, ignore_errors=True)
        if not run.exists():
            dist.log_rank(f"removed swap files of an interrupted run: {run}, {gib(size)} GiB")
    dist.barrier()
    problem = None
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        problem = f"cannot create {folder} for swap files ({error.strerror}): pass another --nvme_path"
    if dist.all_reduce_sum([problem is not None])[0]:
        raise UserError(problem or f"other ranks cannot write below {run.parent}, see their messages")


def _with_paths(resolved: ResolvedConfig, paths: dict[str, str]) -> ResolvedConfig:
    """The config with these folders in place of its own."""
    config = copy.deepcopy(resolved.config)
    for key, folder in nvme_folders(config).items():
        config["zero_optimization"][key]["nvme_path"] = paths[folder]
    return dataclasses.replace(resolved, config=config)
