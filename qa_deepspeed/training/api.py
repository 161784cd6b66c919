"""`train` and `evaluate` for Python: notebooks and scripts call what the commands of the same names call.

Mistakes are exceptions, nothing ends the process, and it may call them again and again. Under a launcher every rank
makes the same calls.
"""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qa_deepspeed.config.run_arguments import options_of_call
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.training.evaluation.evaluate import describe, evaluate_run
from qa_deepspeed.training.reporting.callbacks import Callbacks, OnEvaluate, OnLog, OnSave
from qa_deepspeed.training.reporting.reporter import read_history
from qa_deepspeed.training.stopping import Preempted
from qa_deepspeed.training.train import train as train_run
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import LostRankError, StorageError, UserError
from qa_deepspeed.utils.files import disk_message
from qa_deepspeed.utils.units import plural


@dataclass(frozen=True, repr=False)
class RunResult:
    """What `train` or `evaluate` has made.

    metrics: by name, as in metrics.json; empty where nothing was evaluated.
    folder: the output folder, which after a training is a model; None for an evaluation without one.
    history: the logged values of the whole run in the order of its steps, those before a resume too: dicts of `step`
        and names like `train/loss` or `eval/f1`, the lines of metrics.jsonl. Empty for an evaluation, and on other
        ranks than 0 that do not see the folder.
    """

    metrics: dict[str, Any]
    folder: Path | None
    history: tuple[dict[str, Any], ...] = ()

    def __repr__(self) -> str:
        where = "no folder" if self.folder is None else str(self.folder)
        scores = describe(self.metrics).replace("  ", ", ") if self.metrics else "not evaluated"
        logged = f"; history of {plural(len(self.history), 'log line')}" if self.history else ""
        return f"RunResult({where}: {scores}{logged})"


def train(
    options: RunOptions | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    on_log: OnLog | None = None,
    on_evaluate: OnEvaluate | None = None,
    on_save: OnSave | None = None,
    **settings: Any,
) -> RunResult:
    """Train a model, as `qa-deepspeed train` does: `train(model_name_or_path="roberta-base", train_file=...)`.

    The same call resumes an interrupted run, and returns the result of a finished one without training again.

    Args:
        options: a `RunOptions`; an option that has its default value counts as left out.
        config: a YAML file as for `--config`; `options` win over it.
        on_log, on_evaluate, on_save: called while the run lasts, as `callbacks.Callbacks` describes.
        settings: options by name, as the flags of the command (lists of files where it takes several); these win.
    Raises:
        UserError: options, data, folder or device do not allow it; the message says what to do.
        Preempted: Ctrl-C (the stop button of a notebook), another signal or `max_time`; a checkpoint is saved.
        StorageError: the disk is full or fails; the same call resumes.
        LostRankError: another rank has ended.
    """
    run_options = options_of_call("train", options, config, settings)
    if run_options.dry_run or not run_options.do_train:
        raise UserError("train() trains: leave out dry_run and do_train, or call evaluate()")
    folder = Path(str(run_options.output_dir))
    try:
        with _one_call():
            metrics = run_training(run_options, Callbacks(on_log, on_evaluate, on_save), process_ends=False)
            return RunResult(metrics, folder, tuple(read_history(folder)))
    except Preempted as preempted:
        reason = str(preempted)
    raise Preempted(reason)  # anew: the traceback of the first one, which notebooks keep, holds the model


def evaluate(
    options: RunOptions | None = None, *, config: str | os.PathLike[str] | None = None, **settings: Any
) -> RunResult:
    """Answer and score a file with a trained model, as `qa-deepspeed evaluate` does.

    `evaluate(model_name_or_path="runs/one", predict_file="dev.json")`; with `output_dir`, answers and report are kept.

    Args: as of `train`; options of a training that an evaluation has no use for are ignored in `options`, not in
        `settings`.
    Raises:
        UserError, StorageError, LostRankError: as `train`.
    """
    run_options = options_of_call("evaluate", options, config, settings)
    with _one_call():
        metrics = evaluate_run(run_options)
        return RunResult(metrics, Path(run_options.output_dir) if run_options.output_dir else None)


def run_training(options: RunOptions, callbacks: Callbacks, process_ends: bool) -> dict[str, Any]:
    """`train.train` with one line for a lost rank: what the command and the function `train` call. Collective.

    process_ends: as in `stopping.StopController`.

    Raises: as `train`.
    """
    try:
        return train_run(options, callbacks, process_ends)
    except RuntimeError as error:
        lost = dist.explain_lost_rank(error)
        if lost is None:
            raise
        raise LostRankError(lost) from None


@contextlib.contextmanager
def _one_call() -> Iterator[None]:
    """Wraps a call: the process has the variables of a rank inside, and afterwards is ready for the next call.

    The process group stays: torch and DeepSpeed keep references to it, and the next call joins it again.
    """
    _free_memory()  # of a call that ended with an error
    before = set(os.environ)
    dist.ensure_rank_env()
    added = os.environ.keys() - before
    try:
        yield
        dist.adopt_run_token(dist.broadcast_json(secrets.token_hex(8)))  # overwrite_cache builds again in each call
    except UserError:
        raise
    except Exception as error:
        message = disk_message(error)
        if message is None:
            raise
        raise StorageError(message) from error
    finally:
        for name in added:  # programs that a notebook starts are no ranks
            os.environ.pop(name, None)
        _free_memory()


def _free_memory() -> None:
    """Free the memory of engines and models that nothing uses: they refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
