"""`qa-deepspeed export CHECKPOINT OUT`: a normal Transformers model out of a checkpoint of any ZeRO stage.

Neither a launcher nor a GPU is needed, and about the memory of the model in the type that is asked for, twice. With
`--format onnx` a trained model is exported for onnxruntime instead (export_onnx.py).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from qa_deepspeed.cli.inference.export_folder import export_folder, place
from qa_deepspeed.engine.checkpoints.checkpoint import full_weights
from qa_deepspeed.engine.checkpoints.checkpoint_files import MODEL_FOLDER, LoopState, read_loop_state, verify_checkpoint
from qa_deepspeed.models.loading import model_from_config, quiet_transformers
from qa_deepspeed.models.lora import LoraSettings, add_adapters, save_weights
from qa_deepspeed.runs.verify import load_reference_outputs, verify_saved_model
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.dtypes import DTYPES
from qa_deepspeed.utils.errors import UserError

MAX_SHARD_SIZE = "5GB"
ONNX = "onnx"
MAX_F1_LOSS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `export`."""
    add = parser.add_argument
    add("checkpoint", type=Path, help="a checkpoint-N folder of a run; for --format onnx a trained model")
    add("out", type=Path, help="folder for the model; must be new or empty")
    add(
        "--format",
        choices=("transformers", ONNX),
        default="transformers",
        help="transformers: a model out of a checkpoint; onnx: a trained model for onnxruntime (extra [onnx]), which "
        "predict and QuestionAnswerer run (default transformers)",
    )
    add("--dtype", choices=sorted(DTYPES), default="fp32", help="type of the weights (default fp32)")
    add(
        "--merge_lora",
        action="store_true",
        help="merge LoRA adapters into the weights: a plain model instead of an adapter",
    )
    add("--max_shard_size", default=MAX_SHARD_SIZE, help=f"largest weights file (default {MAX_SHARD_SIZE})")
    add(
        "--predict_file",
        metavar="FILE",
        help="for --format onnx: questions that the model and its export answer; equal answers are counted, and both "
        "are scored if the file has gold answers",
    )
    add(
        "--quantize",
        choices=("int8",),
        help="for --format onnx: matrix products of 8-bit integers, smaller and faster; needs a predict_file with gold "
        "answers, to measure what it costs",
    )
    add(
        "--max_f1_loss",
        type=float,
        help=f"for --format onnx: points of F1 on predict_file that the export may cost (default {MAX_F1_LOSS:g})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Export and verify.

    Raises:
        UserError: options of the other format, or as `export` and `export_onnx` say.
    """
    _check_options(arguments)
    quiet_transformers(verbose=False)
    os.environ["DS_ACCELERATOR"] = "cpu"
    if arguments.format == ONNX:
        from qa_deepspeed.cli.inference.export_onnx import export_onnx

        if arguments.max_f1_loss is None:
            arguments.max_f1_loss = MAX_F1_LOSS
        export_onnx(arguments)
        return 0
    record = export(
        arguments.checkpoint, arguments.out, arguments.dtype, arguments.max_shard_size, arguments.merge_lora
    )
    logits = f", logits within {record['largest_difference']:.1e}" if "largest_difference" in record else ""
    dist.log0(f"{arguments.out} holds step {record['step']}, verified: {record['tensors']} tensors equal{logits}")
    return 0


def _check_options(arguments: argparse.Namespace) -> None:
    """Raise UserError for an option of the other format."""
    given = [name for name in ("predict_file", "quantize", "max_f1_loss") if getattr(arguments, name) is not None]
    if given and arguments.format != ONNX:
        raise UserError(f"--{given[0]} is for --format onnx: add that, or leave it out")
    needy = [name for name in given if name != "predict_file"]
    if needy and not arguments.predict_file:
        raise UserError(f"--{needy[0]} needs --predict_file with gold answers, to measure what the export costs in F1")
    if arguments.format != ONNX:
        return
    if arguments.dtype != "fp32":
        raise UserError(f"--format onnx writes float32: leave --dtype {arguments.dtype} out")
    if arguments.merge_lora or arguments.max_shard_size != MAX_SHARD_SIZE:
        name = "merge_lora" if arguments.merge_lora else "max_shard_size"
        raise UserError(f"--{name} is for --format transformers: leave it out (LoRA adapters are always merged)")


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
    with export_folder(out) as aside:
        loop = read_loop_state(checkpoint)
        model, state = _merged(checkpoint, loop, dtype) if merge else _as_trained(checkpoint, loop, dtype)
        saved = save_weights(aside, model, state, max_shard_size=max_shard_size)
        AutoTokenizer.from_pretrained(checkpoint / MODEL_FOLDER, trust_remote_code=False).save_pretrained(aside)
        reference = load_reference_outputs(checkpoint, loop.precision, loop.device)
        verified = verify_saved_model(aside, saved, reference, merge)
        record = {"step": loop.step, **verified, "checkpoint": str(checkpoint.resolve())}
        place(aside, out, record)
    return record


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
