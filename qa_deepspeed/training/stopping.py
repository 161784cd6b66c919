"""Preemption, time limit and save interval: all ranks agree after each step whether to save and whether to stop."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.runs.requeue import REQUEUE_FILE, REQUEUE_STATUS
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import write_json

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEAT_SECONDS = 10.0
"""Further signals within this time count as the first: launchers send several for one preemption."""

SAME_PRESS_SECONDS = 0.5
"""SIGINTs within this time are one Ctrl-C: the terminal and the launcher may both send it."""


class Preempted(Exception):
    """A signal or the time limit ended the run before its last step; a checkpoint is saved."""


def duration(text: str | None, name: str) -> float:
    """Parse a duration such as `90s`, `15m`, `2h` or `1h30m` into seconds; infinity for None.

    Raises:
        UserError: the text has another form; the message names the option `name`.
    """
    if text is None:
        return float("inf")
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    if hours + minutes + seconds == 0:
        raise UserError(f"{name} '{text}' is not a duration: write it as 90s, 15m, 2h or 1h30m")
    return float(3600 * hours + 60 * minutes + seconds)


@dataclass(frozen=True)
class StepDecision:
    """What all ranks do after a step."""

    save: bool
    """Whether to write a checkpoint."""
    stop: str | None
    """Why the run stops: a signal's name or "max_time"; None to continue."""


class StopController:
    """Handles preemption signals, the time limit and the save interval, from the start of a run to its end.

    Inside `looping()` a signal is recorded, and all ranks act on it together after the step. A second Ctrl-C, or
    another signal more than `REPEAT_SECONDS` later, ends the process immediately. A thread says the one and does the
    other, since handlers run between two instructions of the interpreter, not while a step computes or waits for
    another rank. Outside there is nothing to save, and signals have their default effect, except that SIGUSR1 (Slurm's
    warning; no launcher sends it) requests a requeue.

    With `process_ends` false the process lives on after the run, as a notebook's does: it gets its own handlers back
    after a signal too, and a second Ctrl-C raises KeyboardInterrupt instead of ending it.
    """

    def __init__(self, options: RunOptions, output_dir: Path, process_ends: bool = True) -> None:
        self._process_ends = process_ends
        self._save_every = 0
        self._save_seconds = duration(options.save_on_time, "save_on_time")
        self._max_seconds = duration(options.max_time, "max_time")
        self._output_dir = output_dir
        self._began = self._saved = time.monotonic()
        self._process = os.getpid()
        self._in_loop = False
        self._signal: int | None = None
        self._answered: float | None = None
        self._handlers: dict[int, Any] = {}
        self._wakeup: tuple[socket.socket, socket.socket] | None = None
        self._wakeup_before = -1

    def __enter__(self) -> StopController:
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
            receiver, sender = self._wakeup = socket.socketpair()
            sender.setblocking(False)
            self._wakeup_before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(receiver,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._signal is None or not self._process_ends:  # else launchers may send more while the ranks end
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            if self._wakeup is not None:
                signal.set_wakeup_fd(self._wakeup_before)
                self._wakeup[1].close()  # ends the thread

    def _listen(self, receiver: socket.socket) -> None:
        """Answer the signals that the interpreter writes into the socket, a byte each, as they arrive."""
        with receiver:
            while numbers := receiver.recv(64):
                for number in numbers:
                    self._answer(number)

    def _answer(self, number: int) -> None:
        """Say what a signal does, or end the process, in the training loop."""
        if not self._in_loop or number not in SIGNALS:
            return
        now = time.monotonic()
        if self._answered is None:
            self._answered = now
            again = f"; again within {REPEAT_SECONDS:.0f} s ends now" if number == signal.SIGINT else ""
            dist.log0(f"{signal.Signals(number).name}: stopping after this step{again}")
        elif not self._process_ends:
            return  # a second Ctrl-C is answered by `_handle`
        elif now - self._answered > (SAME_PRESS_SECONDS if number == signal.SIGINT else REPEAT_SECONDS):
            dist.log0("ended before the step was done; the same command resumes from the last checkpoint")
            os._exit(128 + number)

    @contextlib.contextmanager
    def looping(self, save_every: int) -> Iterator[None]:
        """Wraps the training loop, which calls `after_step`: signals are recorded instead of ending the process.

        save_every: optimizer steps between checkpoints; 0 for none.
        """
        self._save_every = save_every
        self._saved = time.monotonic()
        self._in_loop = True
        try:
            yield
        finally:
            self._in_loop = self._signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._in_loop and os.getpid() == self._process:
            if self._signal is None or self._process_ends or number != signal.SIGINT:
                self._signal = self._signal or number
            elif self._answered is not None and time.monotonic() - self._answered > SAME_PRESS_SECONDS:
                raise KeyboardInterrupt
            return
        if number == signal.SIGUSR1 and os.getpid() == self._process:
            self.ask_for_requeue("SIGUSR1 outside the training loop")
            os._exit(REQUEUE_STATUS)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def after_step(self, number: int, steps: int) -> StepDecision:
        """Decide after optimizer step `number` (counted from 1) of `steps`: the same on all ranks. Collective."""
        now = time.monotonic()
        clock = [now - self._saved >= self._save_seconds, now - self._began >= self._max_seconds]
        ours = [self._signal or 0, *(clock if dist.is_rank_zero() else (0, 0))]  # rank 0's clock counts
        signals, on_time, out_of_time = dist.all_reduce_max(ours)
        stop = None
        if number < steps and (signals or out_of_time):
            stop = signal.Signals(int(signals)).name if signals else "max_time"
        save = bool((self._save_every and number % self._save_every == 0) or on_time or stop)
        if save:
            self._saved = now
        return StepDecision(save, stop)

    def ask_for_requeue(self, reason: str) -> None:
        """Write the requeue file, on rank 0: the same command resumes the run.

        Where the disk is full, the exit status alone says so.
        """
        if dist.is_rank_zero():
            with contextlib.suppress(OSError):
                write_json(self._output_dir / REQUEUE_FILE, {"reason": reason, "status": REQUEUE_STATUS})

    def begin(self) -> None:
        """Remove the requeue file of an earlier start, on rank 0."""
        if dist.is_rank_zero():
            (self._output_dir / REQUEUE_FILE).unlink(missing_ok=True)
