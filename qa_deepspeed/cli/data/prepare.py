"""`qa-deepspeed prepare`: build the features of a run beforehand, on any number of processes."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from typing import Any

from qa_deepspeed.config.run_arguments import add_run_arguments, read_run_options
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.facts import ModelFacts, model_facts
from qa_deepspeed.models.loading import quiet_transformers
from qa_deepspeed.training.features import load_features, notes
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.units import plural

HELPER_SECONDS = 5.0
"""How long a helper may take to end when there is nothing left to build."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `prepare`: what shapes the features; --config takes the file of a whole run."""
    parser.add_argument("--num_proc", type=int, default=1, help="processes that build at once (default 1)")
    add_run_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Build the features of the training file and of the file to predict, whichever is given.

    Raises:
        UserError: neither is given, or features cannot be built of one.
    """
    run_options = read_run_options(arguments)
    purposes = [one for one in ("train", "evaluate") if run_options.data_file(one) or run_options.dataset_name]
    if not purposes:
        raise UserError("no data is named: pass --train_file, --predict_file, --data_dir or --dataset_name")
    if arguments.num_proc < 1:
        raise UserError(f"num_proc must be at least 1, not {arguments.num_proc}")
    if arguments.num_proc > 1:
        # Each process gets its share of the cores: tokenizers read this when they start their threads.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, cores // arguments.num_proc)))
    spawn = multiprocessing.get_context("spawn")
    work = (run_options, purposes, dist.run_token(run_options.timeout))
    helpers = [spawn.Process(target=_worker, args=work) for _ in range(arguments.num_proc - 1)]
    for helper in helpers:
        helper.start()
    try:
        for line in _build(run_options, purposes):
            print(line, flush=True)
    finally:
        for helper in helpers:  # all is built, or nothing more will be: one that has not ended hangs
            helper.join(HELPER_SECONDS)
            helper.kill()
            helper.join()
    return 0


def _worker(run_options: RunOptions, purposes: list[Any], token: str) -> None:
    """The same work in another process; the first process reports what fails."""
    dist.adopt_run_token(token)
    try:
        _build(run_options, purposes)
    except UserError:
        sys.exit(2)


def _build(run_options: RunOptions, purposes: list[Any]) -> list[str]:
    """Build what is missing; one line about each file."""
    quiet_transformers(run_options.verbose_logging)
    facts: ModelFacts = model_facts(run_options)
    lines = []
    for purpose in purposes:
        began = time.perf_counter()
        store = load_features(run_options, purpose, facts)
        counts = store.counts
        source = run_options.data_file(purpose) or run_options.dataset_name
        lines.append(
            f"{source}: {plural(counts['examples'], 'question')}, {plural(counts['features'], 'feature')} "
            f"({'built' if store.built else 'found'} in {time.perf_counter() - began:.1f} s, "
            f"{store.fingerprint[:12]}); {store.report.summary()}"
        )
        lines += [f"  {note}" for note in notes(store)]
    return lines
