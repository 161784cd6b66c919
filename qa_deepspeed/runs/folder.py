"""The output folder of a run: who may write there, its record, what a run leaves, and the finished model."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.checkpoints.checkpoint_files import LOOP_FILE
from qa_deepspeed.engine.monitors import CSV_FOLDER
from qa_deepspeed.models.lora import CONFIG_FILE, WEIGHTS_FILE, save_weights
from qa_deepspeed.runs.evaluation_folder import ANSWER_FILES, EVALUATION_FILE
from qa_deepspeed.runs.lock import LOCK_FILE, RunLock
from qa_deepspeed.runs.requeue import REQUEUE_FILE
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import move_files, storage_errors, write_json
from qa_deepspeed.utils.json_files import sealed

RUN_FILE = "run.json"

OUTPUT_DIR_MISSING = "--output_dir is required (a folder for the model, checkpoints and predictions)"

PARTIAL = ".model.partial"
"""Prefix of the folder in which the final model is written before it gets its place."""


def writable_folder(name: str | None) -> Path:
    """The output folder, created if missing.

    Raises:
        UserError: no name is given, or it cannot be created or written.
    """
    if not name:
        raise UserError(OUTPUT_DIR_MISSING)
    folder = Path(name)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"output_dir {name}: the name is not UTF-8, TensorBoard cannot write there: pass another"
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create output_dir {folder}: {error.strerror}") from None
    try:
        with tempfile.TemporaryFile(dir=folder):  # root may write by every permission, but not on a read-only disk
            pass
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written ({error.strerror}): pass another one") from None
    return folder


def lock_run_dir(output_dir: Path, options: RunOptions) -> RunLock | None:
    """On rank 0, lock the folder against other runs; None where it holds no run and will be refused anyway.

    Raises:
        UserError: another run is active in it.
    """
    ours = any((output_dir / name).is_file() for name in (RUN_FILE, LOCK_FILE))
    refused = holds_files(output_dir, options) and not ours and not options.overwrite_output_dir
    if not dist.is_rank_zero() or refused:
        return None
    return RunLock(output_dir)


def leave_run_dir(output_dir: Path, lock: RunLock | None, existed: bool) -> None:
    """Release the lock; a run that was refused before it wrote its record leaves no lock file and no empty folder.

    existed: whether the folder was there before the run.
    """
    if lock is not None:
        lock.release(remove=not os.path.exists(output_dir / RUN_FILE))  # also on a disk that fails
    if dist.is_rank_zero() and not existed:
        with contextlib.suppress(OSError):  # it is not empty
            output_dir.rmdir()


def require_whole_checkpoints(output_dir: Path, options: RunOptions, stage: int) -> None:
    """With node-local disks, no disk has a whole checkpoint of ZeRO stages 1 to 3. Collective.

    Raises:
        UserError: the options need whole models from checkpoints.
    """
    asked = [name for name in ("load_best_model_at_end", "eval_all_checkpoints") if getattr(options, name)]
    if asked and stage > 0 and dist.all_reduce_sum([dist.is_first_on_filesystem(output_dir)])[0] > 1:
        raise UserError(
            f"{', '.join(asked)} needs whole checkpoints, but output_dir {output_dir} is on node-local "
            "disks: pass a folder that all nodes share, or --deepspeed_config zero0"
        )


FILES = (
    RUN_FILE,
    "metrics.jsonl",
    *ANSWER_FILES,
    EVALUATION_FILE,
    "model.safetensors",
    CONFIG_FILE,
    WEIGHTS_FILE,
)
"""Files of a run beside its folders."""


def files_of_run(output_dir: Path) -> list[Path]:
    """What a run of this trainer leaves in its folder and a new run there would replace: files, checkpoints, curves.

    A `checkpoint-N` without this trainer's loop state is another program's.
    """
    if not output_dir.is_dir():
        return []
    folders = [path for path in output_dir.glob("checkpoint-*") if (path / LOOP_FILE).is_file()]
    entries = [*folders, output_dir / "tensorboard", output_dir / CSV_FOLDER, *(output_dir / name for name in FILES)]
    return [path for path in entries if path.exists() or path.is_symlink()]


def holds_files(output_dir: Path, options: RunOptions) -> bool:
    """Whether there is more than a run leaves that was killed before it wrote run.json."""
    cache = Path(options.cache_dir).resolve() if options.cache_dir else None
    return output_dir.is_dir() and any(
        not path.name.startswith((".", "rejected_", REQUEUE_FILE))
        and not (cache and cache.is_relative_to(path.resolve()))
        for path in output_dir.iterdir()
    )


def write_run(output_dir: Path, status: str, identity: dict[str, Any], **details: Any) -> None:
    """Write run.json: `status` is "running" or "finished"."""
    record = {"status": status, "identity": identity, "world_size": dist.world_size(), **details}
    write_json(output_dir / RUN_FILE, sealed(record))


def save_model(
    output_dir: Path,
    model: Any,
    state: dict[str, torch.Tensor],
    tokenizer: Any,
    options: RunOptions,
    check: Callable[[Path, Mapping[str, torch.Tensor]], dict[str, Any]],
) -> dict[str, Any]:
    """Make `output_dir` a normal Transformers checkpoint (or peft adapter), the run's options beside it. For rank 0.

    `check` is called with the folder of the files and the tensors in them before they get their place; it raises if
    they are wrong, and its result is returned.

    Files are written aside, in a fresh folder, and renamed one by one, so that no file is ever partial.
    training_args.bin holds plain values only: `torch.load(weights_only=True)` reads it.

    Raises:
        StorageError: the disk is full or fails; nothing is left of the attempt.
    """
    for leftover in output_dir.glob(f"{PARTIAL}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
    with storage_errors(output_dir):
        aside = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=output_dir))
        try:
            saved = save_weights(aside, model, state)
            tokenizer.save_pretrained(aside)
            write_json(aside / "training_args.json", options.to_dict())
            torch.save(options.to_dict(), aside / "training_args.bin")
            checked = check(aside, saved)
            move_files(aside, output_dir)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return checked
