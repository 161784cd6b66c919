"""The arguments that commands about a run share: --config, --print_config, and the options that a command uses.

And the arguments of a call in Python, which are the same options.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from qa_deepspeed.config import options
from qa_deepspeed.config.migration import ALIASES, STRATEGIES
from qa_deepspeed.config.run_options import RunOptions, missing_options
from qa_deepspeed.config.schema import run_schema
from qa_deepspeed.utils.errors import UserError

OF_A_RUN = ("train", "evaluate")
"""Commands whose YAML file may hold their own options only; the others look at the file of a training run."""

RUNS = (*OF_A_RUN, "check")
"""Commands that take the flags that DeepSpeed's own scripts have."""

PYTHON = "the arguments"
"""Where the options of a call come from, in messages."""


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them for the command that `parser` is for."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same keys as the flags; flags win")
    parser.add_argument("--print_config", action="store_true", help="print the resolved options as YAML and exit")
    if parser.get_default("command") in OF_A_RUN:
        parser.add_argument("--print_schema", action="store_true", help="print a JSON schema of the YAML file and exit")
    options.add_arguments(parser, RunOptions, parser.get_default("command"))
    if parser.get_default("command") in RUNS:
        parser.add_argument("--deepspeed", nargs="?", const="", help="accepted: this trainer always uses DeepSpeed")


def read_run_options(arguments: argparse.Namespace) -> RunOptions:
    """The options of the run; with --print_config they, or with --print_schema the schema, are printed, and the program
    ends.

    Raises:
        UserError: as `options.build`; options that a run of the command needs are missing, all of which are named.
    """
    if getattr(arguments, "deepspeed", None):
        raise UserError(f"--deepspeed takes no file here: pass it as --deepspeed_config {arguments.deepspeed}")
    if getattr(arguments, "print_schema", False):
        print(json.dumps(run_schema(arguments.command), indent=2), flush=True)
        sys.exit(0)
    names = {field.name for field in options.fields_of(RunOptions)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    whole_file = arguments.command not in OF_A_RUN
    run_options = options.build(RunOptions, arguments.command, given, arguments.config, whole_file)
    if arguments.print_config:
        print(options.as_yaml(run_options, arguments.command), flush=True)
        sys.exit(0)
    if arguments.command in OF_A_RUN and not run_options.dry_run:
        missing = missing_options(run_options, arguments.command == "train" and run_options.do_train)
        if missing:
            raise UserError(f"missing: {', '.join(missing)} (see qa-deepspeed {arguments.command} --help)")
    return run_options


def options_of_call(
    command: str, options_given: RunOptions | None, config: str | os.PathLike[str] | None, settings: Mapping[str, Any]
) -> RunOptions:
    """The options of a call in Python of a command of `OF_A_RUN`.

    `settings` win over those of `options_given` that differ from their defaults, which win over the file `config`.
    `options_given` may have options that the command has no use for, as a YAML file of a training run does.

    Raises:
        UserError: as `options.build`; options that the command needs are missing, all of which are named.
    """
    of_command = {field.name for field in options.fields_of(RunOptions, command)}
    chosen = {} if options_given is None else {n: getattr(options_given, n) for n in options_given.chosen & of_command}
    path = None if config is None else os.fspath(config)
    run_options = options.build(RunOptions, command, {**chosen, **settings}, path, given_in=PYTHON)
    missing = missing_options(run_options, command == "train")
    if missing:
        raise UserError(f"missing: {', '.join(missing)}".replace("--", ""))
    return run_options


def commands_with(flag: str) -> list[str]:
    """The commands that use an option, by its flag; none for an unknown one."""
    name = (ALIASES | STRATEGIES).get(flag.lstrip("-"), flag.lstrip("-"))
    return next((list(field.metadata["commands"]) for field in options.fields_of(RunOptions) if field.name == name), [])
