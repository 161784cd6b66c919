"""A thread works one item ahead; at exit a process waits for its threads, with a limit."""

import threading
import time
from collections.abc import Iterator

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


def test_one_item_is_made_while_the_caller_works_on_the_last() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(4):
            made.append(number)
            yield number

    seen = []
    for number in threads.one_ahead(items()):
        deadline = time.monotonic() + 5
        while len(made) < min(number + 2, 4) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert made == list(range(min(number + 2, 4))), "the next item is made meanwhile, and no further one"
        seen.append(number)
    assert seen == [0, 1, 2, 3]


def test_an_error_comes_where_its_item_would() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("disk")

    ahead = threads.one_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="disk"):
        next(ahead)
    assert list(threads.one_ahead(iter(()))) == []
