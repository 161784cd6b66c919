"""The sub-commands `train` and `evaluate`: options from flags and YAML, what retired flags are told, the call."""

from __future__ import annotations

import argparse
import os
import sys

from qa_deepspeed.config import options
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.utils.errors import UserError

RETIRED = {
    "local_rank": "",  # launchers set it; nothing to tell
    "fp16_opt_level": "apex levels are DeepSpeed precisions now: O0 float32, O1 torch_autocast, O2 fp16",
    "threads": "--threads does nothing: tokenizers use RAYON_NUM_THREADS threads, and all cores without it",
    "server_ip": "--server_ip does nothing: attach a debugger with python -m debugpy --listen PORT -m qa_deepspeed ...",
    "server_port": "--server_port does nothing: see --server_ip",
}
"""What is said when a flag that has lost its meaning is given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the sub-command that `parser` is for."""
    parser.add_argument("--config", help="YAML file with the same keys as the flags; flags win")
    group = parser.add_argument_group("DeepSpeed's own arguments")
    group.add_argument("--deepspeed", nargs="?", const="", help="accepted: this trainer always uses DeepSpeed")
    options.add_arguments(parser, RunOptions, parser.get_default("command"))


def run(arguments: argparse.Namespace) -> int:
    """Train or evaluate; returns 0, or 75 where the run stopped in good order with work left.

    Raises:
        UserError: as `train.train` and `evaluate.evaluate_run` say.
    """
    if arguments.deepspeed:
        raise UserError(f"--deepspeed takes no file here: pass it as --deepspeed_config {arguments.deepspeed}")
    given = {name: value for name, value in vars(arguments).items() if name not in ("command", "config", "deepspeed")}
    run_options = options.build(RunOptions, arguments.command, given, arguments.config)
    from qa_deepspeed.utils import dist

    dist.ensure_rank_env()
    for name in sorted(run_options.given & RETIRED.keys()):
        if RETIRED[name]:
            dist.log0(f"note: {RETIRED[name]}")
    if run_options.dry_run:
        from qa_deepspeed.cli.check import check

        return check(run_options) if dist.is_rank_zero() else 0
    if arguments.command == "train" and run_options.do_train:
        from qa_deepspeed.runs.requeue import REQUEUE_STATUS
        from qa_deepspeed.training.stopping import Preempted
        from qa_deepspeed.training.train import train

        try:
            train(run_options)
        except Preempted as stopped:
            dist.log0(str(stopped))
            dist.destroy()
            return REQUEUE_STATUS
        except RuntimeError as error:
            lost = dist.explain_lost_rank(error)
            if lost is None:
                raise
            print(f"qa-deepspeed: error: {lost}", file=sys.stderr, flush=True)
            os._exit(1)  # leaving in good order would wait for the lost rank again
    else:
        from qa_deepspeed.training.evaluate import evaluate_run

        evaluate_run(run_options)
    dist.destroy()
    return 0
