"""CPU affinity: cores are divided among ranks and among parts of work, the user's settings are kept."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from qa_deepspeed.engine.device import cores_of
from qa_deepspeed.inference.forward import on_all_cores
from tests.paths import REPOSITORY

CORES = len(os.sched_getaffinity(0))
REPORT = (
    "import torch; from qa_deepspeed.engine.device import assign_cores; assign_cores(); print(torch.get_num_threads())"
)
AS_TORCHRUN = f"""if True:
    import os, subprocess, sys
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    subprocess.run([sys.executable, "-c", {REPORT!r}], check=True)
"""


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_rank_has_separate_cores(ranks: int) -> None:
    cores = {0, 1, 2, 3, 8, 9, 10, 11}
    parts = [cores_of(cores, rank, ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {8 // ranks}
    assert len(set().union(*parts)) == 8 // ranks * ranks


def test_more_ranks_than_cores_have_one_each() -> None:
    assert [cores_of({4, 5}, rank, 3) for rank in range(3)] == [{4}, {5}, {4}]


@pytest.mark.parametrize(
    ("code", "environment", "threads"),
    [
        (AS_TORCHRUN, {}, CORES),
        (AS_TORCHRUN, {"OMP_NUM_THREADS": "1"}, 1),
        (REPORT, {"LOCAL_WORLD_SIZE": str(2 * CORES)}, 1),
    ],
    ids=["torchrun_alone", "one_asked_for", "deepspeed_launcher"],
)
def test_threads(code: str, environment: dict[str, str], threads: int) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) == threads


@pytest.mark.parametrize(("threads", "parts", "at_once", "of_each"), [(4, 9, 4, 1), (16, 9, 8, 2), (5, 2, 2, 2)])
def test_parts_are_processed_at_the_same_time(
    threads: int, parts: int, at_once: int, of_each: int, threads_put_back: None
) -> None:
    torch.set_num_threads(threads)
    together = threading.Barrier(at_once, timeout=60)  # breaks if fewer are processed at the same time

    def work(part: int) -> tuple[int, int]:
        if part < at_once:
            together.wait()
        return part, torch.get_num_threads()

    assert list(on_all_cores(work, range(parts))) == [(part, of_each) for part in range(parts)]
    assert torch.get_num_threads() == threads
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [threads]


def test_one_thread_or_one_part_needs_no_other_thread(threads_put_back: None) -> None:
    here = threading.get_ident()
    for threads, parts in ((1, 3), (4, 1), (4, 0)):
        torch.set_num_threads(threads)
        assert list(on_all_cores(lambda part: threading.get_ident(), range(parts))) == [here] * parts


def test_an_error_ends_the_work(threads_put_back: None) -> None:
    torch.set_num_threads(2)
    begun: list[int] = []
    released = threading.Event()

    def work(part: int) -> int:
        begun.append(part)
        if part == 0:
            raise ValueError("part 0")
        released.wait(timeout=60)
        return part

    threading.Timer(1.0, released.set).start()
    with pytest.raises(ValueError, match="part 0"):
        list(on_all_cores(work, range(100)))
    assert len(begun) < 10  # no further part begins
    assert torch.get_num_threads() == 2
