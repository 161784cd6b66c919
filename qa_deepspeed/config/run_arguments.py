"""The arguments that commands about a run share: --config, --print_config, and the options that a command uses."""

from __future__ import annotations

import argparse
import sys

from qa_deepspeed.config import options
from qa_deepspeed.config.migration import ALIASES, STRATEGIES
from qa_deepspeed.config.run_options import RunOptions, missing_options
from qa_deepspeed.utils.errors import UserError

OF_A_RUN = ("train", "evaluate")
"""Commands whose YAML file may hold their own options only; the others look at the file of a training run."""

RUNS = (*OF_A_RUN, "check")
"""Commands that take the flags that DeepSpeed's own scripts have."""


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them for the command that `parser` is for."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same keys as the flags; flags win")
    parser.add_argument("--print_config", action="store_true", help="print the resolved options as YAML and exit")
    options.add_arguments(parser, RunOptions, parser.get_default("command"))
    if parser.get_default("command") in RUNS:
        parser.add_argument("--deepspeed", nargs="?", const="", help="accepted: this trainer always uses DeepSpeed")


def read_run_options(arguments: argparse.Namespace) -> RunOptions:
    """The options of the run; with --print_config they are printed and the program ends.

    Raises:
        UserError: as `options.build`; options that a run of the command needs are missing, all of which are named.
    """
    if getattr(arguments, "deepspeed", None):
        raise UserError(f"--deepspeed takes no file here: pass it as --deepspeed_config {arguments.deepspeed}")
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


def commands_with(flag: str) -> list[str]:
    """The commands that use an option, by its flag; none for an unknown one."""
    name = (ALIASES | STRATEGIES).get(flag.lstrip("-"), flag.lstrip("-"))
    return next((list(field.metadata["commands"]) for field in options.fields_of(RunOptions) if field.name == name), [])
