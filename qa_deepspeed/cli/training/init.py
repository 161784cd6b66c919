"""`qa-deepspeed init DIR`: a commented run.yaml for a model and a file, with values from an audit of the file."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from pathlib import Path
from typing import Any

from qa_deepspeed.cli.data.audit import audit
from qa_deepspeed.config import options
from qa_deepspeed.config.run_options import RunOptions, missing_options
from qa_deepspeed.config.schema import run_schema
from qa_deepspeed.models.facts import positions
from qa_deepspeed.models.loading import load_config, quiet_transformers
from qa_deepspeed.qa.data.reading import DataSource
from qa_deepspeed.training.features import data_source
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import os_errors_as_user_errors, write_json, write_text

RUN_FILE, SCHEMA_FILE = "run.yaml", "run.schema.json"

HELD_OUT = 0.1
"""validation_split where no file for the evaluation is named."""

WINDOWS = ("max_seq_length", "doc_stride", "doc_stride_is")
"""Options of one suggestion of the audit, which counts where none of them is given."""

USUAL = (
    "num_train_epochs",
    "learning_rate",
    "warmup_steps",
    "per_gpu_train_batch_size",
    "global_batch_size",
    "eval_steps",
    "save_steps",
    "metric_for_best_model",
    "null_score_diff_threshold",
    "bf16",
    "deepspeed_config",
    "seed",
)
"""Options that runs usually set: those that are not given are in the file as comments, with their defaults."""

WIDTH = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the folder, and the options of `train`, which go into the file."""
    parser.add_argument("dir", metavar="DIR", type=Path, help=f"folder for {RUN_FILE}, made if need be")
    options.add_arguments(parser, RunOptions, "train")


def run(arguments: argparse.Namespace) -> int:
    """Write DIR/run.yaml, and its schema for editors, and print the commands that use it; returns 0.

    Raises:
        UserError: there is such a file, no model or training file is named, or they cannot be read.
    """
    names = {field.name for field in options.fields_of(RunOptions, "train")}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    target = arguments.dir / RUN_FILE
    if target.exists():
        raise UserError(f"{target} exists: remove it, or name another folder")
    wanted = _with_usual_values(options.build(RunOptions, "train", given, None), arguments.dir)
    quiet_transformers(wanted.verbose_logging)
    audited, found = audited_options(wanted)
    with os_errors_as_user_errors(target):
        arguments.dir.mkdir(parents=True, exist_ok=True)
        write_json(arguments.dir / SCHEMA_FILE, run_schema("train"))
        write_text(target, "\n".join(run_file(audited, found)) + "\n")
    command = f"qa-deepspeed {{}} --config {target}"
    print(f"{target}: read it, then\n  {command.format('check')}\n  {command.format('train')}")
    return 0


def _with_usual_values(wanted: RunOptions, folder: Path) -> RunOptions:
    """The options with an output folder and an evaluation where none are named.

    Raises:
        UserError: no model or no training file is named.
    """
    values: dict[str, Any] = {"output_dir": str(folder / "run"), "do_eval": True}
    if not (wanted.predict_file or wanted.data_dir or wanted.dataset_name):
        values["validation_split"] = HELD_OUT
    values = {name: value for name, value in values.items() if name not in wanted.given}
    wanted = dataclasses.replace(wanted, **values, given=wanted.given | values.keys())
    missing = missing_options(wanted, trains=True)
    if missing:
        raise UserError(f"missing: {', '.join(missing)} (see qa-deepspeed init --help)")
    if not wanted.data_file("train"):
        raise UserError(f"init reads files: download {wanted.dataset_name} and pass --train_file")
    return wanted


def audited_options(wanted: RunOptions) -> tuple[RunOptions, dict[str, Any]]:
    """The options, with version 2 and lengths found by an audit of the training files where they are not given.

    Returns the findings too.

    Raises:
        UserError: as `audit`.
    """
    trial: dict[str, Any] = {"version_2_with_negative": True}
    length = min(positions(load_config(wanted)) or wanted.max_seq_length, wanted.max_seq_length)
    if length < RunOptions().max_seq_length:  # too short for the default doc_stride
        trial |= {"max_seq_length": length, "doc_stride": length // 4}
    trial = {name: value for name, value in trial.items() if name not in wanted.given}
    # of the whole file, and lengths are read off all windows of a context
    trial |= {"validation_split": 0.0, "windows_without_answer": "keep"}
    tried = dataclasses.replace(wanted, **trial)
    found = audit(data_source(tried, "train", DataSource.resolve(tried.data_patterns("train"))), tried)
    values: dict[str, Any] = {
        "version_2_with_negative": found["questions"]["unanswerable"] > 0,
        "max_answer_length": max(wanted.max_answer_length, found["answers"]["longest"]),
    }
    if not wanted.given & set(WINDOWS):
        values |= {name: (found["suggestion"] or vars(tried))[name] for name in WINDOWS}
    elif "doc_stride" in trial:
        values["doc_stride"] = tried.doc_stride
    if found["questions"]["cut"]:
        values["max_query_length"] = wanted.max_query_length
    values = {name: value for name, value in values.items() if name not in wanted.given}
    return dataclasses.replace(wanted, **values, given=wanted.given | values.keys()), found


def run_file(chosen: RunOptions, found: dict[str, Any]) -> list[str]:
    """The lines of run.yaml: what is given or found as keys, with the reason above it, usual defaults as comments."""
    reasons = _reasons(chosen, found)
    files = ", ".join(found["files"])
    questions = found["questions"]
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        "# A run of `qa-deepspeed train --config` this file. Paths are those from the folder in which it is started.",
        f"# Values are from an audit of {files} for {found['model']}:",
        f"# {questions['usable']:,} questions are usable, {questions['rejected']:,} are rejected "
        "(`qa-deepspeed audit` says why).",
    ]
    fields = {field.name: field for field in options.fields_of(RunOptions, "train")}
    given = [name for name in fields if name in chosen.given]
    for name in given:
        lines += ["", *_comment(reasons.get(name, fields[name].metadata["help"]))]
        lines.append(options.yaml_entry(name, getattr(chosen, name)))
    lines += ["", "# Defaults of what runs usually set:"]
    for name in USUAL:
        if name not in chosen.given:
            lines += ["", *_comment(fields[name].metadata["help"])]
            lines.append(f"# {options.yaml_entry(name, getattr(chosen, name))}")
    return lines


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)]


def _reasons(chosen: RunOptions, found: dict[str, Any]) -> dict[str, str]:
    """Why an option has its value, where the audit says it."""
    questions, answers, lengths = found["questions"], found["answers"], found["lengths"]
    spread = ", ".join(f"{name} {value:,}" for name, value in lengths.items() if name != "histogram")
    unanswerable = questions["unanswerable"]
    reasons = {
        "version_2_with_negative": f"{unanswerable:,} of {questions['usable']:,} questions are unanswerable",
        "max_seq_length": f"tokens of a question with its whole context: {spread}",
        "max_answer_length": f"the longest answer has {answers['longest']:,} tokens",
    }
    if chosen.validation_split == HELD_OUT:
        reasons["validation_split"] = (
            "evaluate on this part of the contexts, and train on the rest; or name a predict_file instead"
        )
    if questions["cut"]:
        reasons["max_query_length"] = f"{questions['cut']:,} questions are longer, and cut"
    suggestion = found["suggestion"]
    if suggestion and suggestion["max_seq_length"] == chosen.max_seq_length:
        reasons["doc_stride"] = (
            "tokens from one window of a long context to the next: with these lengths "
            f"{suggestion['windows']:,} windows, {suggestion['tokens']:,} tokens"
        )
    return reasons
