"""`python -m qa_deepspeed.torchrun ...`: torchrun, whose exit status tells how the run ended.

torchrun exits with 1 after any failure. Here the status is that of the rank that failed first: 2 for a user's mistake,
75 after preemption, also when torchrun itself received the signal. Then the rank has said why in one line, which stays
the last one: torchrun's lines about the end of such a rank are left out.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from qa_deepspeed.runs.requeue import REQUEUE_FILE, REQUEUE_STATUS
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.home import ensure_home

ELASTIC_LOGGER = "torch.distributed.elastic.multiprocessing.api"
"""Logs how ranks end."""

SAID_BY_THE_RANK = re.compile(rf"exitcode: (2|{REQUEUE_STATUS})\)|Sending process \d+ closing signal")


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of torchrun says what no rank has said."""
    return SAID_BY_THE_RANK.search(record.getMessage()) is None


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments; the exit status."""
    ensure_home()
    logging.getLogger(ELASTIC_LOGGER).addFilter(_is_news)
    status = dist.torchrun(arguments)
    folder = output_folder(arguments)
    if status > 128 and folder is not None and (folder / REQUEUE_FILE).exists():
        return REQUEUE_STATUS
    return status


def output_folder(arguments: Sequence[str]) -> Path | None:
    """The value of --output_dir among the arguments, if it is there."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--output_dir" and (equals or place + 1 < len(arguments)):
            return Path(value if equals else arguments[place + 1])
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
