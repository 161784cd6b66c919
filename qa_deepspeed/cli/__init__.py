"""The command line: one file per sub-command, in folders by purpose, and the parser that finds them.

Imports: every other folder; nothing imports it.
Start reading: main.py, then training/train.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """As `main.main`: console scripts of installations made before version 0.2 call it here."""
    from qa_deepspeed.cli.main import main as run

    run(arguments)
