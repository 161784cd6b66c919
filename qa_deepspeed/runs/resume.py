"""Start, resume or nothing to do: decided from what an output folder holds, without changing anything there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.checkpoints.checkpoint_files import (
    checkpoints,
    newest_first,
    read_loop_state,
    verify_checkpoint,
)
from qa_deepspeed.engine.ds_config import STAND_IN
from qa_deepspeed.runs.folder import RUN_FILE, files_of_run, holds_files
from qa_deepspeed.runs.identity import may_change, refuse_changes
from qa_deepspeed.runs.requeue import REQUEUE_FILE
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.json_files import ANYTHING, DamagedFile, read_json

START, RESUME, FINISHED = "start", "resume", "finished"

NEWEST = ("auto", "true")
"""Values of resume_from_checkpoint that ask for the newest checkpoint of the run, if there is one."""

NEVER = ("never", "false")

MICRO_BATCH_OPTIONS = ("per_gpu_train_batch_size", "gradient_accumulation_steps")
"""Where these are unchanged, a resumed run keeps its global batch size on any number of ranks."""

RECORD = {"status?": str, "identity": {str: ANYTHING}, "options?": {str: ANYTHING}}
"""What resuming needs of run.json, by `json_files.fault_of`."""

EVALUATION_OPTIONS = (
    "predict_file",
    "predict_split",
    "max_eval_examples",
    "null_score_diff_threshold",
    "n_best_size",
    "max_answer_length",
    "decode_mode",
    "gather",
    "best_window_only",
    "merge_duplicate_texts",
    "metric_language",
    "eval_all_checkpoints",
)
"""Options that change the evaluation of a run, and not its training."""

INPUTS = ("model_name_or_path", "config_name", "tokenizer_name", "train_file", "predict_file", "deepspeed_config")
"""Options that name what a run reads."""


@dataclass(frozen=True)
class ResumeDecision:
    """What a run does in its output folder."""

    action: str
    """START, RESUME or FINISHED."""
    checkpoint: str = ""
    """With RESUME: a checkpoint folder, or "auto" for the newest whole one."""
    overwrites: bool = False
    """With START: what an earlier run left there is moved aside first (`files_of_run`)."""


def resume_decision(output_dir: Path, options: RunOptions, fingerprint: dict[str, Any]) -> ResumeDecision:
    """Decide what the run of `fingerprint` (`identity.run_fingerprint`) does in `output_dir`. For rank 0.

    Raises:
        UserError: the folder holds another run or other files, or the options contradict each other.
    """
    asked = _asked(options)
    requeued = was_requeued(output_dir, fingerprint)
    if options.overwrite_output_dir and not requeued:
        refuse_overwriting(output_dir, options)
        return ResumeDecision(START, overwrites=bool(files_of_run(output_dir)))
    named = asked not in (*NEWEST, *NEVER)
    if named:
        state = read_loop_state(named_checkpoint(asked))
        refuse_changes(state.identity, fingerprint, state.options, options, asked)
    resume = ResumeDecision(RESUME, asked if named and not requeued else "auto")
    if not holds_files(output_dir, options):
        return resume if named else ResumeDecision(START)
    run = read_run(output_dir, report=dist.log0)
    if run is None or asked in NEVER:
        raise UserError(
            f"output_dir {output_dir} is not empty: pass another one, or --overwrite_output_dir to start again"
        )
    refuse_changes(run.get("identity", {}), fingerprint, run.get("options", {}), options, str(output_dir))
    if named:
        return resume
    if run.get("status") == "finished" and run.get("identity") == fingerprint:
        _refuse_another_evaluation(output_dir, options, run.get("options", {}))
        return ResumeDecision(FINISHED)
    return resume if checkpoints(output_dir) else ResumeDecision(START)


def _refuse_another_evaluation(output_dir: Path, options: RunOptions, recorded: dict[str, Any]) -> None:
    """A finished run is not evaluated in another way by its training command.

    Raises:
        UserError: names the options that differ, and the command that evaluates.
    """
    changed = [name for name in EVALUATION_OPTIONS if name in recorded and recorded[name] != getattr(options, name)]
    if recorded and not any(recorded.get(name) for name in ("do_eval", "evaluate_during_training", "eval_steps")):
        changed = ["do_eval", *changed]
    if (options.do_eval or options.evaluates_during_training) and changed:
        raise UserError(
            f"{output_dir} holds this run, finished, and its evaluation had another {', '.join(changed)}: "
            f"`qa-deepspeed evaluate --model_name_or_path {output_dir} --predict_file ... --output_dir ...` evaluates "
            "it in another way, --overwrite_output_dir trains again"
        )


def refuse_overwriting(output_dir: Path, options: RunOptions) -> None:
    """Refuse --overwrite_output_dir where it would remove what is not a run's, or what the new run needs.

    Raises:
        UserError: says which.
    """
    if _asked(options) not in (*NEWEST, *NEVER):
        raise UserError(
            "--overwrite_output_dir starts again and --resume_from_checkpoint resumes: leave one of them out"
        )
    if not holds_files(output_dir, options):
        return
    if read_run(output_dir) is None:
        raise UserError(
            f"output_dir {output_dir} holds files, but no run of this trainer (no {RUN_FILE}): pass another one"
        )
    removed = [path.resolve() for path in files_of_run(output_dir)]
    for name, path in _inputs(options):
        inside = path == output_dir.resolve() or any(path.is_relative_to(other) for other in removed)
        if path.exists() and inside:
            raise UserError(
                f"--overwrite_output_dir would remove {path}, which --{name} names: copy it elsewhere, or pass another "
                "--output_dir"
            )


def _inputs(options: RunOptions) -> Iterator[tuple[str, Path]]:
    for name in INPUTS:
        if name.endswith("_file"):
            values = options.data_patterns("train" if name == "train_file" else "evaluate")
        else:
            values = (getattr(options, name),)
        for value in filter(None, values):
            yield name, Path(value).resolve()


def select_checkpoint(output_dir: Path, asked: str, fingerprint: dict[str, Any]) -> Path:
    """The checkpoint to resume from: `asked`, or with "auto" the newest that is whole on every disk. Collective.

    Checkpoints of the current settings come before those of earlier ones. Damaged ones that are passed over are named.

    Raises:
        UserError: none is whole.
    """
    auto = asked == "auto"
    acting = dist.is_first_on_filesystem(output_dir)
    found = newest_first(output_dir, fingerprint) if auto else [named_checkpoint(asked)]
    for name in dist.broadcast_json([str(path) for path in found]):
        problem = verify_checkpoint(Path(name)) if acting else None
        if problem:
            dist.log_rank(f"{name} is damaged and not used: {problem}")
        if not dist.all_reduce_sum([problem is not None])[0]:
            return Path(name)
    if auto:
        raise UserError(
            f"all checkpoints in {output_dir} are damaged, see above: restore one, or start again with "
            "--overwrite_output_dir"
        )
    raise UserError(
        f"checkpoint {asked} is damaged, see above: name another one, or leave --resume_from_checkpoint out"
    )


def _asked(options: RunOptions) -> str:
    """The value of resume_from_checkpoint; of the words in `NEWEST` and `NEVER` in small letters, as YAML has True."""
    asked = options.resume_from_checkpoint
    return asked.lower() if asked.lower() in (*NEWEST, *NEVER) and not Path(asked).exists() else asked


def require_named_checkpoint(options: RunOptions) -> None:
    """Raises UserError if resume_from_checkpoint names a checkpoint that is none."""
    asked = _asked(options)
    if asked not in (*NEWEST, *NEVER):
        read_loop_state(named_checkpoint(asked))


def named_checkpoint(asked: str) -> Path:
    """The checkpoint that `resume_from_checkpoint` names, also where it was renamed after a change of the batch."""
    path = Path(asked)
    renamed = [] if path.exists() else list(path.parent.glob(f"{path.name}.batch*"))
    return renamed[0] if len(renamed) == 1 else path


def was_requeued(output_dir: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether this very run was preempted there and asked for a requeue.

    The same command then resumes from there, also where it says --overwrite_output_dir or names a checkpoint.
    """
    run = read_run(output_dir) or {}
    return (output_dir / REQUEUE_FILE).is_file() and run.get("identity") == fingerprint


def resumed_batch_size(output_dir: Path, options: RunOptions) -> int | None:
    """Global batch size of the run that will be resumed, which another number of ranks keeps. For rank 0.

    None where there is no such run, or where `resume_with_changes`, `global_batch_size` or changed micro-batches ask
    for another number.
    """
    if "global_batch_size" in options.given:
        return None
    fingerprint, theirs = _run_to_resume(output_dir, options)
    same = all(theirs.get(name) == getattr(options, name) for name in MICRO_BATCH_OPTIONS)
    size: int | None = fingerprint.get("global_batch_size")
    return size if same and not may_change("global_batch_size", options) else None


def resumed_config(output_dir: Path, options: RunOptions) -> str | None:
    """The DeepSpeed config of the run that will be resumed; None where there is no such run. For rank 0.

    Runs of before the choice recorded nothing where the user named none.
    """
    fingerprint, theirs = _run_to_resume(output_dir, options)
    return str(theirs.get("deepspeed_config") or STAND_IN) if fingerprint else None


def _run_to_resume(output_dir: Path, options: RunOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fingerprint and options of the run that will be resumed; empty where there is none."""
    asked = _asked(options)
    if options.overwrite_output_dir or asked in NEVER:
        return {}, {}
    if asked in NEWEST:
        run = read_run(output_dir) or {}
        return run.get("identity", {}), run.get("options", {})
    state = read_loop_state(named_checkpoint(asked))
    return state.identity, state.options


def read_run(output_dir: Path, report: Callable[[str], None] = lambda line: None) -> dict[str, Any] | None:
    """The record of the run in `output_dir`; None where there is none.

    A damaged run.json costs nothing that a checkpoint knows as well: fingerprint and options come from its loop state.

    Args:
        report: called with one line about a damaged run.json.
    """
    try:
        record: dict[str, Any] | None = read_json(output_dir / RUN_FILE, RECORD)
    except DamagedFile as error:
        report(f"{error}; taking what the checkpoints know")
        record = None
    if record is not None:
        return record
    for checkpoint in reversed(checkpoints(output_dir)):
        try:
            state = read_loop_state(checkpoint)
        except UserError:
            continue
        return {"status": "running", "identity": state.identity, "options": state.options}
    return None
