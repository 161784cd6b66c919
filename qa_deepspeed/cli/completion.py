"""`qa-deepspeed completion bash`: a script that completes commands, flags and their values, without starting Python."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from qa_deepspeed.cli.main import COMMANDS, parser_of

HEAD = """\
# Completion of qa-deepspeed for bash, made by `qa-deepspeed completion bash`; make it anew after an upgrade.
_qa_deepspeed() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} command=${COMP_WORDS[1]} words= word
"""
TAIL = """\
    COMPREPLY=()
    while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -W "$words" -- "$current")
}
complete -o default -F _qa_deepspeed qa-deepspeed  # where nothing else is known, names of files
"""
BESIDE_COMMANDS = ("help", "--help", "--version")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the shell."""
    parser.add_argument("shell", choices=("bash",), help="bash; zsh reads the same script after bashcompinit")


def run(arguments: argparse.Namespace) -> int:
    """Print the script; returns 0."""
    print(script(), end="")
    return 0


def script() -> str:
    """The bash script: words for the command, its flags after a dash, the values of the flag before the cursor."""
    names = " ".join(COMMANDS)
    flags, values = [], []
    for command in COMMANDS:
        actions = parser_of(command)._actions
        known = [flag for action in actions for flag in action.option_strings if flag.startswith("--")]
        flags.append(f'            {command}) words="{" ".join(sorted(known))}" ;;')
        for action in actions:
            if found := " ".join(words_of(action)):
                patterns = "|".join(f'"{command} {flag}"' for flag in action.option_strings or [command])
                values.append(f'            {patterns}) words="{found}" ;;')
    lines = [
        "    if [[ $COMP_CWORD -eq 1 ]]; then",
        f'        words="{names} {" ".join(BESIDE_COMMANDS)}"',
        "    elif [[ $command == help ]]; then",
        f'        words="{names}"',
        "    elif [[ $current == -* ]]; then",
        "        case $command in",
        *flags,
        "        esac",
        "    else",
        '        case "$command $previous" in',
        *values,
        "        esac",
        "    fi",
    ]
    return HEAD + "\n".join(lines) + "\n" + TAIL


def words_of(action: argparse.Action) -> Iterator[str]:
    """The words that an argument takes, as far as they are known: choices, true and false, `auto` beside a number."""
    shown = action.metavar if isinstance(action.metavar, str) else ""
    if action.choices:
        yield from map(str, action.choices)
    elif shown.startswith("{"):
        yield from shown.strip("{}").split(",")
    elif "|" in shown:
        yield from (word for word in shown.split("|") if word.islower())
