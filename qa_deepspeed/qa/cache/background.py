"""A call that a thread of its own makes while the caller does other work."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Cancelled(Exception):
    """Raised inside the call when its result is no longer wanted."""


class BackgroundCall:
    """`call` in a daemon thread; it returns whether it has done something.

    `call` gets a function that raises Cancelled once nobody wants the result.
    """

    def __init__(self, call: Callable[[Callable[[], None]], bool]) -> None:
        self._call = call
        self._thread: threading.Thread | None = None
        self._done_something = False
        self._error: BaseException | None = None
        self._cancelled = threading.Event()

    def running(self) -> bool:
        """Whether the call is in progress.

        Raises: what the last call raised.
        """
        busy = self._thread is not None and self._thread.is_alive()
        if not busy and self._error is not None:
            raise self._error
        return busy

    def start(self) -> None:
        """Call it, again if it has ended."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait for the call's end, this long at most; whether it is in progress or has done something since."""
        if self._thread is None:
            return False
        self._thread.join(seconds)
        if self._thread.is_alive():
            return True
        done_something, self._done_something = self._done_something, False
        return done_something

    def cancel(self) -> None:
        """Make the call raise Cancelled at its next check, and wait for its end."""
        self._cancelled.set()
        if self._thread is not None:
            self._thread.join()

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled

    def _run(self) -> None:
        try:
            self._done_something = self._call(self._check)
        except Cancelled:
            pass
        except BaseException as error:
            self._error = error
