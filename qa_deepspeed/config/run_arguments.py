"""The arguments that commands about a run share: --config, --print_config, and the options that a command uses."""

from __future__ import annotations

import argparse
import sys

from qa_deepspeed.config import options
from qa_deepspeed.config.migration import ALIASES
from qa_deepspeed.config.run_options import RunOptions

OF_A_RUN = ("train", "evaluate")
"""Commands whose YAML file may hold their own options only; the others look at the file of a training run."""


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them for the command that `parser` is for."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same keys as the flags; flags win")
    parser.add_argument("--print_config", action="store_true", help="print the resolved options as YAML and exit")
    options.add_arguments(parser, RunOptions, parser.get_default("command"))


def read_run_options(arguments: argparse.Namespace) -> RunOptions:
    """The options of the run; with --print_config they are printed and the program ends.

    Raises:
        UserError: as `options.build`.
    """
    names = {field.name for field in options.fields_of(RunOptions)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    whole_file = arguments.command not in OF_A_RUN
    run_options = options.build(RunOptions, arguments.command, given, arguments.config, whole_file)
    if arguments.print_config:
        print(options.as_yaml(run_options, arguments.command), flush=True)
        sys.exit(0)
    return run_options


def commands_with(flag: str) -> list[str]:
    """The commands that use an option, by its flag; none for an unknown one."""
    name = ALIASES.get(flag.lstrip("-"), flag.lstrip("-"))
    return next((list(field.metadata["commands"]) for field in options.fields_of(RunOptions) if field.name == name), [])
