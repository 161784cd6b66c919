"""What a preflight check says of a run's settings, its output folder and the disk; nothing is written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qa_deepspeed.config.option_groups import AUTO
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import ds_config
from qa_deepspeed.engine.ds_config import ResolvedConfig
from qa_deepspeed.runs.resume import FINISHED, RESUME, START
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.units import GIB, plural

SHOWN = (
    "per_gpu_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
)
"""Settings that options, the run file or the DeepSpeed config may set."""


IN_WORDS = {
    START: "the run starts at step 0",
    RESUME: "the run resumes from a checkpoint",
    FINISHED: "holds this run, finished: there is nothing to do",
}
"""What `resume_decision` decides."""

CACHE_PER_INPUT = 2.0
"""Bytes of cached features for each byte of input, as measured on SQuAD (2.0 with MiniLM's tokenizer)."""


def features_bytes(files: Iterable[str]) -> int:
    """Bytes of the features of some files, about."""
    return int(CACHE_PER_INPUT * sum(map(os.path.getsize, files)))


def settings_with_origins(resolved: ResolvedConfig, options: RunOptions) -> list[str]:
    """A line for each of `SHOWN`: its value and where that comes from. options: as they were given."""
    said = ds_config.load(resolved.name)
    lines = []
    for name in SHOWN:
        keys = [key for key, owner in ds_config.OWNER_OF.items() if owner == name]
        origin = resolved.name if any(_at(said, key) not in (None, AUTO) for key in keys) else options.origin(name)
        value = getattr(resolved.options, name)
        if name == "gradient_accumulation_steps":
            value = resolved.plan.gradient_accumulation_steps
            origin = origin if resolved.options.global_batch_size is None else "from global_batch_size"
        lines.append(f"  {name} {value}   ({origin})")
    return lines


def _at(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def require_writable(folder: Path) -> None:
    """Raises UserError if the folder, or the one in which it would be created, cannot be written."""
    try:
        with tempfile.TemporaryFile(dir=_nearest(folder)):
            pass
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written ({error.strerror}): pass another one") from None


def require_room(folder: Path, checkpoints: int, checkpoint_bytes: int, other_bytes: int) -> str:
    """The line about the disk of a folder that gets so many checkpoints, the model and features.

    Raises:
        UserError: it has too little room.
    """
    wanted, free = checkpoints * checkpoint_bytes + other_bytes, shutil.disk_usage(_nearest(folder)).free
    each = f"{plural(checkpoints, 'checkpoint')} of {checkpoint_bytes / GIB:.2f} GiB"
    line = f"at most {wanted / GIB:.2f} GiB ({each}, the model), {free / GIB:.1f} GiB free"
    if wanted > free:
        raise UserError(f"{line}: make room, or lower the number of checkpoints with --save_total_limit")
    return line


def require_swap_room(folder: Path, swap_bytes: int, output_dir: Path, other_bytes: int) -> str:
    """The line about the NVMe disk of a folder that gets these swap files. other_bytes: those of the output folder,
    which may be on the same disk.

    Raises:
        UserError: it has too little room.
    """
    free = shutil.disk_usage(folder).free
    if os.stat(_nearest(output_dir)).st_dev == os.stat(folder).st_dev:
        free -= other_bytes
    line = f"swap files of at most {swap_bytes / GIB:.2f} GiB in {folder} until the run ends, {free / GIB:.1f} GiB free"
    if swap_bytes > free:
        raise UserError(f"{line}: make room, or pass another --nvme_path")
    return line


def _nearest(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
