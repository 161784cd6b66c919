"""`qa-deepspeed evaluate`: answer and score a file with a trained model, on any number of ranks."""

from __future__ import annotations

import argparse

from qa_deepspeed.cli.training.train import add_arguments as add_arguments
from qa_deepspeed.cli.training.train import start_run


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; returns 0.

    Raises:
        UserError: as `evaluate.evaluate_run`.
    """
    run_options = start_run(arguments)
    from qa_deepspeed.training.evaluation.evaluate import evaluate_run
    from qa_deepspeed.utils import dist

    evaluate_run(run_options)
    dist.destroy()
    return 0
