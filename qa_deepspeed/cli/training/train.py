"""`qa-deepspeed train`: options from flags and YAML, notes on deprecated flags, the call."""

from __future__ import annotations

import argparse

from qa_deepspeed.config.run_arguments import add_run_arguments, read_run_options
from qa_deepspeed.config.run_options import RunOptions

DEPRECATED = {
    "fp16_opt_level": "apex levels are DeepSpeed precisions now: O0 float32, O1 torch_autocast, O2 fp16",
    "threads": "--threads is ignored: tokenizers use RAYON_NUM_THREADS threads, by default all cores",
    "server_ip": "--server_ip is ignored: attach a debugger with python -m debugpy --listen PORT -m qa_deepspeed ...",
    "server_port": "--server_port is ignored: see --server_ip",
}
"""The note that is printed when a deprecated flag is given; launchers set local_rank, which needs none."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the sub-command that `parser` is for."""
    add_run_arguments(parser)


def start_run(arguments: argparse.Namespace) -> RunOptions:
    """The options of the run, in a process that has the variables of a rank; notes on deprecated flags are printed.

    Raises:
        UserError: options that cannot be read.
    """
    run_options = read_run_options(arguments)
    from qa_deepspeed.utils import dist

    dist.ensure_rank_env()
    for name in sorted(run_options.given & DEPRECATED.keys()):
        dist.log0(f"note: {DEPRECATED[name]}")
    return run_options


def run(arguments: argparse.Namespace) -> int:
    """Train; returns 0, or 75 after preemption (also the status of a StorageError that the same command repairs).

    Raises:
        UserError: as `api.run_training` and `evaluate.evaluate_run`.
    """
    run_options = start_run(arguments)
    from qa_deepspeed.utils import dist

    if run_options.dry_run:
        from qa_deepspeed.cli.training.check import check

        return check(run_options) if dist.is_rank_zero() else 0
    if not run_options.do_train:
        from qa_deepspeed.training.evaluation.evaluate import evaluate_run

        evaluate_run(run_options)
        dist.destroy()
        return 0
    from qa_deepspeed.runs.requeue import REQUEUE_STATUS
    from qa_deepspeed.training.api import run_training
    from qa_deepspeed.training.reporting.callbacks import NO_CALLBACKS
    from qa_deepspeed.training.stopping import Preempted

    status = 0
    try:
        run_training(run_options, NO_CALLBACKS, process_ends=True)
    except Preempted as preempted:
        dist.log0(str(preempted))
        status = REQUEUE_STATUS
    dist.destroy()
    return status
