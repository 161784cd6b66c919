"""A thread that works one step ahead, and the orderly end of a process whose libraries have threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")

TASKS = Path("/proc/self/task")
"""Where Linux lists the threads of this process."""

POLL_SECONDS = 0.002
"""Threads that sleep from one poll to the next are idle. gloo's socket thread wakes up every 10 ms."""

TIMEOUT_SECONDS = 2.0
"""Limit on the waiting time: a thread may never be idle."""


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items; a thread makes the next one while the caller works on the last.

    An error in making an item is raised where that item would come.
    """
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]  # `end` is no item


def wait_until_threads_are_idle() -> bool:
    """Wait until every other thread of this process is idle; returns whether they are. Called at exit.

    gloo's threads free the tensors of a collective shortly after its end and need Python's lock for that. Python before
    3.14 ends a thread that asks for the lock while the interpreter shuts down, and since the thread is inside a C++
    destructor, that aborts the process ("terminate called without an active exception"). The threads exist as long as
    their process group, which DeepSpeed's parameters keep after `destroy_process_group`.
    """
    if not TASKS.is_dir():
        time.sleep(POLL_SECONDS)  # not Linux: frees Python's lock for a moment, which usually suffices
        return False
    deadline = time.monotonic() + TIMEOUT_SECONDS
    before = _context_switches()
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)  # frees Python's lock: a thread that waits for it wakes up, as the next poll shows
        now = _context_switches()
        if all(now.values()) and now == before:
            return True
        before = now
    return False


def _context_switches() -> dict[str, list[str]]:
    """Counts of context switches of each other thread, as lines; none for a thread that does not sleep now."""
    found = {}
    for thread in os.listdir(TASKS):
        try:
            status = (TASKS / thread / "status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        if thread != str(threading.get_native_id()):
            sleeps = any(line.startswith("State:\tS") for line in status)
            found[thread] = [line for line in status if "ctxt_switches" in line] if sleeps else []
    return found
