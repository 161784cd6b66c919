"""A disk that is full at the end of a run: wait for room, then end so that the same command finishes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from qa_deepspeed.engine.checkpoints.checkpoint_files import checkpoints
from qa_deepspeed.runs.requeue import REQUEUE_STATUS
from qa_deepspeed.training.stopping import StopController
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import StorageError
from qa_deepspeed.utils.files import storage_errors

T = TypeVar("T")

RETRY_SECONDS = 15.0
"""Longest time between two attempts."""


class DiskPatience:
    """Repeats what a full or failing disk prevents, for `seconds` in all. Every rank has one; calls are collective."""

    def __init__(self, seconds: float) -> None:
        self._seconds_left = seconds

    def call(self, act: Callable[[], T]) -> T:
        """The result of `act`, which raises a StorageError on every rank or on none.

        Raises:
            StorageError: the time is over.
        """
        announced = False
        while True:
            try:
                return act()
            except StorageError as error:
                if self._seconds_left <= 0:  # the same on all ranks, which subtract the same pauses
                    raise
                if not announced:
                    dist.log0(f"{error}; trying again for {self._seconds_left:.0f} s (--save_retry): make room")
                announced = True
            pause = min(RETRY_SECONDS, self._seconds_left)
            time.sleep(pause)
            self._seconds_left -= pause


@contextmanager
def requeue_on_disk_failure(output_dir: Path, stops: StopController) -> Iterator[None]:
    """Inside, which is a run from its first step to its end, a StorageError asks for the same command again.

    Raises:
        StorageError: with the status of a requeue, and what the same command does.
    """
    try:
        with storage_errors(output_dir):
            yield
    except StorageError as error:
        found = checkpoints(output_dir)
        resumes = f"resumes from {found[-1].name}" if found else "trains again, since there is no checkpoint"
        stops.ask_for_requeue("the disk is full or fails")
        raise StorageError(f"{error}; make room, then the same command {resumes}", REQUEUE_STATUS) from None
