"""The command line: find the sub-command, parse, call, print. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from qa_deepspeed.config.options import fate_of, nearest, separate_flags
from qa_deepspeed.utils.errors import UserError

COMMANDS = {
    "train": ("qa_deepspeed.cli.train", "fine-tune a reader (alone, or under deepspeed or torchrun)"),
    "evaluate": ("qa_deepspeed.cli.train", "answer and score a file with a trained reader"),
    "export": ("qa_deepspeed.cli.export", "make a normal model out of a checkpoint, and prove it"),
    "score": ("qa_deepspeed.cli.score", "score any system's predictions against a gold file, without a model"),
    "predict": ("qa_deepspeed.cli.predict", "answer questions with a trained reader, from a file or one by one"),
    "ensemble": ("qa_deepspeed.cli.ensemble", "one set of answers out of the n-best files of several runs"),
    "compare": ("qa_deepspeed.cli.compare", "runs side by side: what differs, and whether F1 does by more than chance"),
    "prepare": ("qa_deepspeed.cli.prepare", "build the features of a run beforehand"),
    "audit": ("qa_deepspeed.cli.audit", "what training on a file would do: faults, lengths, windows"),
    "check": ("qa_deepspeed.cli.check", "say whether a run would start and what it would do, without loading weights"),
    "plan": ("qa_deepspeed.cli.plan", "memory and traffic of a model under every shipped DeepSpeed config"),
    "sample": ("qa_deepspeed.cli.sample", "make the quickstart's corpus and tiny model"),
}
"""Sub-command -> module that has its add_arguments and run, and what it does."""

OTHER_RANKS_WAIT_SECONDS = 20
"""Ranks other than 0 wait so long before they tell an error: when rank 0 has the same one, the launcher ends them."""


class Parser(argparse.ArgumentParser):
    """argparse, with errors as one line and the nearest known flag named."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage."""
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_all(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse; an unknown argument is an error that names the nearest known flag.

        Raises:
            UserError: anything that argparse would exit for.
        """
        namespace, unknown = self.parse_known_args(separate_flags(self, arguments))
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            told = fate_of(unknown[0].split("=")[0], flags)
            raise UserError(f"unknown argument {unknown[0]}{told} (see {self.prog} --help)")
        return namespace


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 if all went well, 2 for a user's mistake, 130 when interrupted.

    A command may have statuses of its own: `train` returns 75 when it was stopped with work left.
    """
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(OTHER_RANKS_WAIT_SECONDS)
        print(f"qa-deepspeed: error: {error}", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader of our output went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    # The deepspeed launcher puts --local_rank=N before everything else; the environment says the same.
    while arguments and arguments[0].split("=")[0] in ("--local_rank", "--local-rank"):
        del arguments[: 1 if "=" in arguments[0] else 2]
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_help()
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        raise UserError(f"unknown command '{command}'{nearest(command, COMMANDS)}; there are {', '.join(COMMANDS)}")
    module_name, description = COMMANDS[command]
    module = importlib.import_module(module_name)
    parser = Parser(prog=f"qa-deepspeed {command}", description=description, allow_abbrev=False)
    parser.set_defaults(command=command)
    module.add_arguments(parser)
    return module.run(parser.parse_all(rest))


def _print_help() -> None:
    print("usage: qa-deepspeed COMMAND ...   (the same as python -m qa_deepspeed COMMAND ...)\n")
    for command, (_, description) in COMMANDS.items():
        print(f"  {command:10}{description}")
    print("\nqa-deepspeed COMMAND --help tells a command's options.")
