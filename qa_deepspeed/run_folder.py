"""The output folder: whose run it holds, where to go on, and the finished model in it."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qa_deepspeed.config import RunOptions
from qa_deepspeed.errors import UserError
from qa_deepspeed.files import write_json

RUN_FILE = "run.json"
LOOP_FILE = "loop.json"


@dataclass(frozen=True)
class LoopState:
    """Where the loop is. Order is a function of the step, so this is all that resuming needs besides the shards."""

    step: int
    world_size: int
    zero_stage: int
    identity: dict[str, Any]


def writable_folder(name: str | None) -> Path:
    """The output folder, made if it is not there.

    Raises:
        UserError: none was named, or it cannot be made or written.
    """
    if not name:
        raise UserError("where to? pass --output_dir (a folder for the model, checkpoints and predictions)")
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make output_dir {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"output_dir {folder} cannot be written: pass another one")
    return folder


def where_to_begin(output_dir: Path, options: RunOptions, identity: dict[str, Any]) -> tuple[str, Path | None]:
    """What to do in `output_dir`: ("fresh", None), ("resume", checkpoint) or ("finished", None). For rank 0.

    `identity` is what makes this run this run; a folder that holds another one is refused.

    Raises:
        UserError: the folder holds something else and may not be overwritten.
    """
    if options.overwrite_output_dir:
        _remove_run(output_dir)
        return "fresh", None
    asked = options.resume_from_checkpoint
    if asked not in ("auto", "never"):
        _refuse_other_run(read_loop_state(Path(asked)).identity, identity, Path(asked))
        return "resume", Path(asked)
    if not any(output_dir.iterdir()):
        return "fresh", None
    run = _read_run(output_dir)
    if run is None or asked == "never":
        raise UserError(
            f"output_dir {output_dir} is not empty: pass another one, or --overwrite_output_dir to start afresh"
        )
    _refuse_other_run(run.get("identity", {}), identity, output_dir)
    if run.get("status") == "finished":
        return "finished", None
    found = checkpoints(output_dir)
    return ("resume", found[-1]) if found else ("fresh", None)


def write_run(output_dir: Path, status: str, identity: dict[str, Any], **details: Any) -> None:
    """Write run.json: `status` is "running" or "finished"."""
    write_json(output_dir / RUN_FILE, {"status": status, "identity": identity, **details})


def save_model(
    output_dir: Path, model: Any, state: dict[str, torch.Tensor], tokenizer: Any, options: RunOptions
) -> None:
    """Make `output_dir` a normal Transformers checkpoint, with the run's options beside it. For rank 0.

    Files are written aside and renamed one by one, so that no file is ever half there. training_args.bin holds plain
    values only: `torch.load(weights_only=True)` reads it.
    """
    aside = output_dir / ".model.partial"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, state_dict=state)
    tokenizer.save_pretrained(aside)
    write_json(aside / "training_args.json", options.to_dict())
    torch.save(options.to_dict(), aside / "training_args.bin")
    for path in aside.iterdir():
        os.replace(path, output_dir / path.name)
    aside.rmdir()


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    named = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    complete = [path for path in named if (path / LOOP_FILE).is_file()]
    return sorted(complete, key=lambda path: int(path.name.split("-")[1]))


def read_loop_state(checkpoint: Path) -> LoopState:
    """The loop's state of a checkpoint.

    Raises:
        UserError: `checkpoint` is not a complete checkpoint folder.
    """
    try:
        return LoopState(**json.loads((checkpoint / LOOP_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint} is not a complete checkpoint of this trainer ({error})") from None


def _read_run(output_dir: Path) -> dict[str, Any] | None:
    try:
        return json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _refuse_other_run(theirs: dict[str, Any], ours: dict[str, Any], where: Path) -> None:
    different = [
        f"{name} {theirs.get(name)} there, {ours.get(name)} here"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]
    if different:
        raise UserError(f"{where} holds another run ({'; '.join(different)}): pass another --output_dir, or "
                        "--overwrite_output_dir to start afresh")  # fmt: skip


def _remove_run(output_dir: Path) -> None:
    """Take away what a run of this trainer leaves, and nothing else."""
    for path in [*output_dir.glob("checkpoint-*"), output_dir / "tensorboard", output_dir / ".model.partial"]:
        shutil.rmtree(path, ignore_errors=True)
    for name in (RUN_FILE, "metrics.jsonl", "metrics.json", "predictions.json", "nbest_predictions.json",
                 "null_odds.json", "model.safetensors"):  # fmt: skip
        (output_dir / name).unlink(missing_ok=True)
