"""`qa-deepspeed export CHECKPOINT OUT`: a normal Transformers model out of a checkpoint of any ZeRO stage.

Neither a launcher nor a GPU is needed, and about the memory of the model in the type that is asked for, twice.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from qa_deepspeed.engine.checkpoints.checkpoint import full_weights
from qa_deepspeed.engine.checkpoints.checkpoint_files import MODEL_FOLDER, LoopState, read_loop_state, verify_checkpoint
from qa_deepspeed.models.loading import model_from_config, quiet_transformers
from qa_deepspeed.models.lora import LoraSettings, add_adapters, save_weights
from qa_deepspeed.runs.verify import load_reference_outputs, verify_saved_model
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.dtypes import DTYPES
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import move_files, os_errors_as_user_errors, write_json

RECORD_FILE = "run.json"
"""Written last: an export that has it is whole."""
PARTIAL = ".partial"
"""Folder inside the export's own until everything is verified: the folder itself may be a mounted disk, or the one that
the user is in."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `export`."""
    parser.add_argument("checkpoint", type=Path, help="a checkpoint-N folder of a run")
    parser.add_argument("out", type=Path, help="folder for the model; must be new or empty")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="type of the weights (default fp32)")
    parser.add_argument(
        "--merge_lora",
        action="store_true",
        help="merge LoRA adapters into the weights: a plain model instead of an adapter",
    )
    parser.add_argument("--max_shard_size", default="5GB", help="largest weights file (default 5GB)")


def run(arguments: argparse.Namespace) -> int:
    """Export and verify.

    Raises:
        UserError: as `export` says.
    """
    quiet_transformers(verbose=False)
    os.environ["DS_ACCELERATOR"] = "cpu"
    record = export(
        arguments.checkpoint, arguments.out, arguments.dtype, arguments.max_shard_size, arguments.merge_lora
    )
    logits = f", logits within {record['largest_difference']:.1e}" if "largest_difference" in record else ""
    dist.log0(f"{arguments.out} holds step {record['step']}, verified: {record['tensors']} tensors equal{logits}")
    return 0


def export(
    checkpoint: Path, out: Path, dtype: str = "fp32", max_shard_size: str = "5GB", merge: bool = False
) -> dict[str, Any]:
    """Write the model of `checkpoint` into `out` and verify it; returns the result of the reload check (in run.json).

    Raises:
        UserError: the checkpoint is damaged, `out` holds something or cannot be written, there is nothing to `merge`,
            or the reload check fails (then `out` is unchanged).
    """
    problem = verify_checkpoint(checkpoint)
    if problem and (checkpoint / "config.json").is_file():
        raise UserError(f"{checkpoint} holds a finished model already: name a checkpoint-N folder of a run")
    if problem:
        raise UserError(f"{checkpoint} cannot be exported: {problem}")
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]?i?B", max_shard_size, re.IGNORECASE):
        raise UserError(f"max_shard_size '{max_shard_size}' is not a size like 5GB or 500MB")
    there = out.exists()
    if there and (not out.is_dir() or any(path.name != PARTIAL or path.is_symlink() for path in out.iterdir())):
        raise UserError(f"{out} is not empty: name a new folder")
    loop = read_loop_state(checkpoint)
    aside = out / PARTIAL
    try:
        with os_errors_as_user_errors(out):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            model, state = _merged(checkpoint, loop, dtype) if merge else _as_trained(checkpoint, loop, dtype)
            saved = save_weights(aside, model, state, max_shard_size=max_shard_size)
            AutoTokenizer.from_pretrained(checkpoint / MODEL_FOLDER, trust_remote_code=False).save_pretrained(aside)
            verified = verify_saved_model(
                aside, saved, load_reference_outputs(checkpoint, loop.precision, loop.device), merge
            )
            record = {"step": loop.step, **verified, "checkpoint": str(checkpoint.resolve())}
            _place(aside, out, {"status": "exported", "export": record})
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if not there and out.exists() and not any(out.iterdir()):
            out.rmdir()
    return record


def _place(aside: Path, out: Path, record: dict[str, Any]) -> None:
    """Move the verified files into `out` and write the record, or leave `out` as empty as it was."""
    names = [path.name for path in aside.iterdir()]
    try:
        move_files(aside, out)
        write_json(out / RECORD_FILE, record)
    except OSError:
        for name in names:
            (out / name).unlink(missing_ok=True)
        raise


def _as_trained(checkpoint: Path, loop: LoopState, dtype: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model without its weights, and these; with its adapters, if it has any."""
    with torch.device("meta"):
        model, _ = _model(checkpoint, loop)
    return model.to(DTYPES[dtype]), full_weights(checkpoint, DTYPES[dtype])


def _merged(checkpoint: Path, loop: LoopState, dtype: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model with its adapters merged into its weights, in float32 whatever the type asked for, and its weights."""
    model, tuner = _model(checkpoint, loop)
    if tuner is None:
        raise UserError(f"{checkpoint} was trained without LoRA, there is nothing to merge: leave --merge_lora out")
    model.load_state_dict(full_weights(checkpoint))
    merged = tuner.merge_and_unload(progressbar=sys.stderr.isatty()).to(DTYPES[dtype])
    return merged, merged.state_dict()


def _model(checkpoint: Path, loop: LoopState) -> tuple[Any, Any]:
    """The checkpoint's model with any weights, and the tuner of its adapters or None."""
    config = AutoConfig.from_pretrained(checkpoint / MODEL_FOLDER, trust_remote_code=False)
    model = model_from_config(config, loop.options["qa_head"])
    settings = LoraSettings.of(loop.options)
    if settings is None:
        return model, None
    return model, add_adapters(model, settings, loop.options["model_name_or_path"], loop.options["seed"])
