"""The output folder: whose run it holds, where to go on, and the finished model in it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.checkpoint_files import checkpoints, damage, newest_first, read_loop_state, rename_by_rows
from qa_deepspeed.models.lora import CONFIG_FILE, WEIGHTS_FILE, save_weights
from qa_deepspeed.runs.identity import may_change, refuse_changes
from qa_deepspeed.runs.lock import LOCK_FILE, RunLock
from qa_deepspeed.runs.requeue import REQUEUE_FILE
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import move_files, write_json

RUN_FILE = "run.json"

MICRO_BATCH_OPTIONS = ("per_gpu_train_batch_size", "gradient_accumulation_steps")
"""Where these are as they were, a run that goes on keeps the rows of its steps, whatever the number of ranks."""


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
    try:
        with tempfile.TemporaryFile(dir=folder):  # root may write by every permission, but not on a read-only disk
            pass
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written ({error.strerror}): pass another one") from None
    return folder


def lock_run_dir(output_dir: Path, options: RunOptions) -> RunLock | None:
    """On rank 0, hold the folder against other runs; None where it is not a run's and will be refused anyway.

    Raises:
        UserError: another run is at work in it.
    """
    ours = any((output_dir / name).is_file() for name in (RUN_FILE, LOCK_FILE))
    refused = _holds_files(output_dir, options) and not ours and not options.overwrite_output_dir
    if not dist.is_rank_zero() or refused:
        return None
    return RunLock(output_dir)


def resume_decision(output_dir: Path, options: RunOptions, identity: dict[str, Any]) -> str:
    """What to do in `output_dir`: "fresh", "resume" (from the newest good checkpoint) or "finished". For rank 0.

    `identity` is what makes this run this run; a folder that holds another one is refused.

    Raises:
        UserError: the folder holds something else and may not be overwritten.
    """
    if options.overwrite_output_dir and not asked_for_more(output_dir, identity):
        _remove_run(output_dir)
        return "fresh"
    asked = options.resume_from_checkpoint
    named = asked not in ("auto", "never")
    if named:
        state = read_loop_state(_named(asked))
        refuse_changes(state.identity, identity, state.options, options, asked)
    if not _holds_files(output_dir, options):
        return "resume" if named else "fresh"
    run = _read_run(output_dir)
    if run is None or asked == "never":
        raise UserError(
            f"output_dir {output_dir} is not empty: pass another one, or --overwrite_output_dir to start afresh"
        )
    refuse_changes(run.get("identity", {}), identity, run.get("options", {}), options, str(output_dir))
    if named:
        return "resume"
    if run.get("status") == "finished" and run.get("identity") == identity:
        return "finished"
    return "resume" if checkpoints(output_dir) else "fresh"


def require_whole_checkpoints(output_dir: Path, options: RunOptions, stage: int) -> None:
    """Where nodes have disks of their own, no disk has a whole checkpoint of ZeRO stages 1 to 3. Collective.

    Raises:
        UserError: the options ask for models out of checkpoints, and there will be none.
    """
    asked = [name for name in ("load_best_model_at_end", "eval_all_checkpoints") if getattr(options, name)]
    if asked and stage > 0 and dist.all_reduce_sum([dist.is_first_on_filesystem(output_dir)])[0] > 1:
        raise UserError(
            f"{', '.join(asked)} needs whole checkpoints, but output_dir {output_dir} is on a disk of each "
            "node's own: pass a folder that all nodes share, or --deepspeed_config zero0"
        )


def select_checkpoint(output_dir: Path, asked: str, identity: dict[str, Any]) -> Path:
    """The checkpoint to go on from: `asked`, or with "auto" the newest that is whole on every disk. Collective.

    Those of the run as it is now (`identity`) come before those it had before its settings were changed. Damaged ones
    that are passed over are named.

    Raises:
        UserError: none is whole.
    """
    auto = asked == "auto"
    acting = dist.is_first_on_filesystem(output_dir)
    if acting:
        rename_by_rows(output_dir, identity["global_batch_size"])
    dist.barrier()
    candidates = [str(path) for path in (newest_first(output_dir, identity) if auto else [_named(asked)])]
    for name in dist.broadcast_json(candidates):
        problem = damage(Path(name)) if acting else None
        if problem:
            dist.log_rank(f"{name} is damaged and not used: {problem}")
        if not dist.all_reduce_sum([problem is not None])[0]:
            return Path(name)
    if auto:
        raise UserError(
            f"no checkpoint in {output_dir} is whole, see above: put a good one there, or start afresh "
            "with --overwrite_output_dir"
        )
    raise UserError(
        f"checkpoint {asked} is damaged, see above: name another one, or leave --resume_from_checkpoint out"
    )


def _named(asked: str) -> Path:
    """The checkpoint that `resume_from_checkpoint` names, also where its run has renamed it for its other batches."""
    path = Path(asked)
    renamed = [] if path.exists() else list(path.parent.glob(f"{path.name}.batch*"))
    return renamed[0] if len(renamed) == 1 else path


def _holds_files(output_dir: Path, options: RunOptions) -> bool:
    """Whether there is more than what a run leaves that was killed before it had written run.json."""
    cache = Path(options.cache_dir).resolve() if options.cache_dir else None
    return any(
        not path.name.startswith((".", "rejected_", REQUEUE_FILE))
        and not (cache and cache.is_relative_to(path.resolve()))
        for path in output_dir.iterdir()
    )


def asked_for_more(output_dir: Path, identity: dict[str, Any]) -> bool:
    """Whether this very run stopped there to be started again: the command that comes back is the same, also where it
    once said --overwrite_output_dir or named a checkpoint, and goes on from where it stopped."""
    run = _read_run(output_dir) or {}
    return (output_dir / REQUEUE_FILE).is_file() and run.get("identity") == identity


def global_batch_size_of(output_dir: Path, options: RunOptions) -> int | None:
    """Rows of one step of the run that will be gone on with, which another number of ranks keeps. For rank 0.

    None where there is no such run, or `resume_with_changes`, `global_batch_size` or other micro-batches ask for
    another number.
    """
    afresh = options.overwrite_output_dir or options.resume_from_checkpoint == "never"
    if afresh or "global_batch_size" in options.given:
        return None
    if options.resume_from_checkpoint == "auto":
        run = _read_run(output_dir) or {}
        identity, theirs = run.get("identity", {}), run.get("options", {})
    else:
        state = read_loop_state(_named(options.resume_from_checkpoint))
        identity, theirs = state.identity, state.options
    same = all(theirs.get(name) == getattr(options, name) for name in MICRO_BATCH_OPTIONS)
    return identity.get("global_batch_size") if same and not may_change("global_batch_size", options) else None


def write_run(output_dir: Path, status: str, identity: dict[str, Any], **details: Any) -> None:
    """Write run.json: `status` is "running" or "finished"."""
    record = {"status": status, "identity": identity, "world_size": dist.world_size(), **details}
    write_json(output_dir / RUN_FILE, record)


def save_model(
    output_dir: Path,
    model: Any,
    state: dict[str, torch.Tensor],
    tokenizer: Any,
    options: RunOptions,
    check: Callable[[Path, Mapping[str, torch.Tensor]], dict[str, Any]],
) -> dict[str, Any]:
    """Make `output_dir` a normal Transformers checkpoint (or peft adapter), the run's options beside it. For rank 0.

    `check` looks at the files, which hold the tensors that it is passed, before they get their place, and raises if
    they are wrong; returns what it returns.

    Files are written aside and renamed one by one, so that no file is ever half there. training_args.bin holds plain
    values only: `torch.load(weights_only=True)` reads it.
    """
    aside = output_dir / ".model.partial"
    shutil.rmtree(aside, ignore_errors=True)
    saved = save_weights(aside, model, state)
    tokenizer.save_pretrained(aside)
    write_json(aside / "training_args.json", options.to_dict())
    torch.save(options.to_dict(), aside / "training_args.bin")
    checked = check(aside, saved)
    move_files(aside, output_dir)
    return checked


def _read_run(output_dir: Path) -> dict[str, Any] | None:
    try:
        return json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _remove_run(output_dir: Path) -> None:
    """Take away what a run of this trainer leaves, and nothing else."""
    for path in [*output_dir.glob("checkpoint-*"), output_dir / "tensorboard", output_dir / ".model.partial"]:
        shutil.rmtree(path, ignore_errors=True)
    for name in (
        RUN_FILE,
        "metrics.jsonl",
        "metrics.json",
        "predictions.json",
        "nbest_predictions.json",
        "null_odds.json",
        "logits.npz",
        "report.json",
        "report.html",
        "model.safetensors",
        CONFIG_FILE,
        WEIGHTS_FILE,
    ):
        (output_dir / name).unlink(missing_ok=True)
