"""The cores of a machine, divided among the ranks on it, and a rank's cores among what it works on at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from qa_deepspeed import dist

THREADS = "OMP_NUM_THREADS"

MOST_AT_ONCE = 8
"""Parts that one process works on at the same time: of more, Python itself would take turns with the products."""


def share_cores() -> None:
    """Give this rank its part of the machine's cores, unless the user or a launcher that binds ranks has done so.

    Left alone, ranks that the deepspeed launcher starts have a thread per core of the machine each, and take each
    other's cores: steps become 4 to 40 times slower. torchrun sets one thread a rank, which leaves cores idle.
    """
    if _threads_were_chosen() or not hasattr(os, "sched_getaffinity"):
        return
    mine, bound = os.sched_getaffinity(0), False
    if len(mine) == len(os.sched_getaffinity(os.getppid())):  # with fewer than its launcher, a rank was bound by it
        mine = cores_of(mine, dist.local_rank(), dist.local_world_size())
        bound = len(mine) > 1 and dist.local_world_size() > 1
    torch.set_num_threads(len(mine))
    if bound:  # to a single core it would have no way out when something else runs there
        os.sched_setaffinity(0, mine)
    if dist.local_world_size() > 1:
        dist.log0(f"each of {dist.local_world_size()} ranks here computes with {len(mine)} "
                  f"{'cores of its own' if bound else 'threads'} ({THREADS} sets another number)")  # fmt: skip


def on_all_cores(work: Callable[[Any], Any], parts: Sequence[Any]) -> Iterator[Any]:
    """`work` of each part, in their order, as many parts at the same time as torch has threads (`MOST_AT_ONCE`).

    A core that has a forward pass to itself waits for no other core; cores that share every operation of one pass do.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(parts), MOST_AT_ONCE)
    if workers < 2:
        yield from map(work, parts)
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        yield from pool.map(work, parts)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # threads that are started later take over the number that was set last


def cores_of(cores: set[int], rank: int, ranks: int) -> set[int]:
    """The cores of one of `ranks` ranks: as many for each, at least one, neighbours by number."""
    each = max(1, len(cores) // ranks)
    ordered = sorted(cores)
    begin = rank * each % len(ordered)
    return set(ordered[begin : begin + each])


def _threads_were_chosen() -> bool:
    """Whether the user said how many threads; torchrun says 1 for those who said nothing, which is no choice."""
    if THREADS not in os.environ:
        return False
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ[THREADS] != "1":
        return True
    try:  # what torchrun itself was started with
        started = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return any(entry.startswith(f"{THREADS}=".encode()) for entry in started)
