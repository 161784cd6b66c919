"""The command line: find the sub-command, parse, call, print. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn, TextIO

import qa_deepspeed
from qa_deepspeed.config.options import hint, nearest, separate_flags
from qa_deepspeed.config.run_arguments import commands_with
from qa_deepspeed.utils.errors import LostRankError, StorageError, UserError
from qa_deepspeed.utils.files import disk_message
from qa_deepspeed.utils.home import ensure_home

COMMANDS = {
    "train": (
        "qa_deepspeed.cli.training.train",
        "fine-tune a model (alone, or under deepspeed or torchrun)",
        "deepspeed --num_gpus 8 --module qa_deepspeed train --model_name_or_path roberta-base --train_file "
        "train-v1.1.json --predict_file dev-v1.1.json --do_eval --output_dir runs/one",
    ),
    "evaluate": (
        "qa_deepspeed.cli.results.evaluate",
        "answer and score a file with a trained model",
        "qa-deepspeed evaluate --model_name_or_path runs/one --predict_file dev-v1.1.json --output_dir runs/one-dev",
    ),
    "predict": (
        "qa_deepspeed.cli.inference.predict",
        "answer questions with a trained model, from a file or one by one",
        "qa-deepspeed predict questions.jsonl --model_name_or_path runs/one --output answers.jsonl",
    ),
    "demo": (
        "qa_deepspeed.cli.inference.demo",
        "answer questions on a page in the browser, with a trained model",
        "qa-deepspeed demo runs/one",
    ),
    "score": (
        "qa_deepspeed.cli.results.score",
        "score any system's predictions against a gold file, without a model",
        "qa-deepspeed score dev-v2.0.json predictions.json --null_odds null_odds.json",
    ),
    "compare": (
        "qa_deepspeed.cli.results.compare",
        "runs side by side: what differs, and whether F1 differs by more than chance",
        "qa-deepspeed compare runs/one runs/other",
    ),
    "ensemble": (
        "qa_deepspeed.cli.results.ensemble",
        "one set of answers from the n-best files of several runs",
        "qa-deepspeed ensemble runs/a/nbest_predictions.json runs/b/nbest_predictions.json --output_dir runs/both",
    ),
    "export": (
        "qa_deepspeed.cli.inference.export",
        "make a normal model of a checkpoint and verify it",
        "qa-deepspeed export runs/one/checkpoint-500 model --dtype bf16",
    ),
    "audit": (
        "qa_deepspeed.cli.data.audit",
        "what training on a file would do: rejected questions, lengths, windows",
        "qa-deepspeed audit train-v2.0.json --model_name_or_path roberta-base --version_2_with_negative",
    ),
    "convert": (
        "qa_deepspeed.cli.data.convert",
        "write any readable file as clean SQuAD v2 JSON",
        "qa-deepspeed convert export.csv train.json --encoding cp1252",
    ),
    "sweep": (
        "qa_deepspeed.cli.training.sweep",
        "runs over seeds and settings, one after another or one on each GPU, and a table of their scores",
        "qa-deepspeed sweep --config run.yaml --seed 1,2,3 --learning_rate 2e-5,3e-5,5e-5 --output_dir runs/sweep",
    ),
    "prepare": (
        "qa_deepspeed.cli.data.prepare",
        "build the features of a run beforehand",
        "qa-deepspeed prepare --config run.yaml --num_proc 8",
    ),
    "init": (
        "qa_deepspeed.cli.training.init",
        "write a commented run.yaml for a model and a file, with what an audit found as values",
        "qa-deepspeed init runs/mine --model_name_or_path roberta-base --train_file train-v2.0.json",
    ),
    "check": (
        "qa_deepspeed.cli.training.check",
        "say whether a run would start and what it would do, without loading weights",
        "qa-deepspeed check --config run.yaml --hostfile hosts",
    ),
    "plan": (
        "qa_deepspeed.cli.training.plan",
        "memory and traffic of a model under every shipped DeepSpeed config",
        "qa-deepspeed plan --model_name_or_path bert-large-uncased --gpus_per_node 8 --gpu_memory 80GiB --bf16",
    ),
    "sample": (
        "qa_deepspeed.cli.data.sample",
        "generate the quickstart's corpus and tiny model",
        "qa-deepspeed sample quickstart/sample",
    ),
    "completion": (
        "qa_deepspeed.cli.completion",
        "print a script that completes commands and flags on the tab key",
        "qa-deepspeed completion bash > ~/.local/share/bash-completion/completions/qa-deepspeed",
    ),
}
"""Sub-command -> module with its add_arguments and run, what it does, an example."""

PACKAGES = ("torch", "transformers", "deepspeed")
"""Whose versions --version prints besides this package's."""

OTHER_RANKS_WAIT_SECONDS = 20
"""Other ranks delay their error this long, so that rank 0's is printed alone: the launcher then ends them."""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the nearest known flag."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_all(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse; unknown arguments are one error that says where each belongs or which flag is nearest.

        Raises:
            UserError: anything that argparse would exit for.
        """
        namespace, unknown = self.parse_known_args(separate_flags(self, arguments))
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            flags = [one for one in unknown if one.startswith("-")] or unknown[:1]
            raise UserError("; ".join(_unknown(one, known) for one in flags) + f" (see {self.prog} --help)")
        return namespace


def _unknown(argument: str, known: list[str]) -> str:
    flag = argument.split("=")[0]
    commands = commands_with(flag) if flag.startswith("--") else []
    if commands:
        return f"{flag} is an option of {', '.join(commands)}, not of this command"
    return f"unknown argument {argument}{hint(flag, known)}"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 for success, 1 for a lost rank, 2 for a user's mistake or a disk that is full
    or fails, 130 when interrupted.

    A command may have statuses of its own: `train` returns 75 after preemption, and where the disk fails meanwhile.
    """
    _prepare_process()
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
    except LostRankError as error:
        print(f"qa-deepspeed: error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # an orderly exit would wait for the lost rank again
    except UserError as error:
        status = _report(str(error), error.status if isinstance(error, StorageError) else 2)
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader of our output closed it (`| head`)
        _to_nowhere(sys.stdout)
        status = 141
    except Exception as error:  # the disk may fail in any library's reading and writing
        message = disk_message(error)
        if message is None:
            raise
        status = _report(message, 2)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:  # its disk is full: flushed again at exit, it would replace the status
            _to_nowhere(stream)
            if status == 0 and stream is sys.stdout:
                status = (
                    141 if isinstance(error, BrokenPipeError) else _report(f"the output is lost: {error.strerror}", 2)
                )
    sys.exit(status)


def _open_standard_streams() -> None:
    """Open those that are closed on /dev/null: the next file that is opened would take their place, and be written to
    by libraries that print."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def _report(message: str, status: int) -> int:
    """Print the line of an error, on other ranks than 0 later; returns `status`."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(OTHER_RANKS_WAIT_SECONDS)
    with contextlib.suppress(OSError):
        print(f"qa-deepspeed: error: {message}", file=sys.stderr, flush=True)
    return status


def _to_nowhere(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _prepare_process() -> None:
    """A home for caches, and output streams that escape what has no UTF-8 form (file names are any bytes)."""
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    home = ensure_home()
    if home is not None and os.environ.get("RANK", "0") == "0":
        print(f"this user has no home folder: caches are in {home} (set HOME to choose)", file=sys.stderr, flush=True)


def _run(arguments: list[str]) -> int:
    # The deepspeed launcher puts --local_rank=N before everything else; the environment holds the same number.
    while arguments and arguments[0].split("=")[0] in ("--local_rank", "--local-rank"):
        del arguments[: 1 if "=" in arguments[0] else 2]
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(_versions())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        raise UserError(f"unknown command '{command}'{nearest(command, COMMANDS)}; commands: {', '.join(COMMANDS)}")
    namespace = parser_of(command).parse_all(rest)
    status: int = importlib.import_module(COMMANDS[command][0]).run(namespace)
    return status


def parser_of(command: str) -> Parser:
    """The parser of a command's arguments, with its help."""
    module_name, description, example = COMMANDS[command]
    parser = Parser(
        prog=f"qa-deepspeed {command}",
        description=f"{description[0].upper()}{description[1:]}. Example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=command)
    importlib.import_module(module_name).add_arguments(parser)
    positional = [action.metavar or action.dest.upper() for action in parser._actions if not action.option_strings]
    parser.usage = " ".join([parser.prog, *map(str, positional), "[options]"])
    return parser


def _help() -> str:
    lines = [
        "usage: qa-deepspeed COMMAND [options]   (or python -m qa_deepspeed COMMAND [options])",
        "",
        "Fine-tune Transformers models for extractive question answering with DeepSpeed, for example:",
        f"  {COMMANDS['train'][2]}",
        "",
        *(f"  {command:12}{description}" for command, (_, description, _) in COMMANDS.items()),
        "",
        "qa-deepspeed help COMMAND lists the options of a command, qa-deepspeed --version the versions in use.",
    ]
    return "\n".join(lines)


def _versions() -> str:
    found = [f"qa_deepspeed {qa_deepspeed.__version__}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} (not installed)")
    return "\n".join(found)
