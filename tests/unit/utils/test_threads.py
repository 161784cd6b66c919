"""At exit a process waits for its threads, with a limit."""

import threading
import time

import pytest

from qa_deepspeed.utils import threads


def busy_thread(seconds: float) -> threading.Thread:
    """A thread that computes for so long."""
    end = time.monotonic() + seconds

    def work() -> None:
        while time.monotonic() < end:
            pass

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_it_waits_for_a_busy_thread() -> None:
    thread = busy_thread(0.3)
    assert threads.wait_until_threads_are_idle()
    assert not thread.is_alive()


def test_it_gives_up_on_a_thread_that_is_never_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "TIMEOUT_SECONDS", 0.1)
    thread = busy_thread(0.6)
    assert not threads.wait_until_threads_are_idle()
    assert thread.is_alive()
    thread.join()
