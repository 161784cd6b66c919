"""Ranks: every exchange with uneven and empty shares, and the same calls alone."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import LostRankError, UserError
from tests.distributed.launching import free_port, run
from tests.paths import REPOSITORY


@pytest.mark.distributed
def test_three_ranks(tmp_path: Path) -> None:
    command = ["torchrun", "--nproc_per_node", "3", "--master_port", free_port(), "-m", "tests.distributed.collectives"]
    done = run([*command, str(tmp_path)], REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]


def wait_longer_than_the_timeout(rank: int, port: str, answers: Any) -> None:
    """One of two ranks: rank 0 takes a second more than the timeout, then fails as a user's mistake does."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init(torch.device("cpu"), 3)

    def upload(refused: str) -> str:
        time.sleep(4 if not refused else 0)
        if refused:
            raise UserError(refused)
        return "uploaded"

    answers_of_rank = [dist.run_on_rank_zero(lambda: upload(""), no_timeout=True)]
    try:
        dist.run_on_rank_zero(lambda: upload("no login"), no_timeout=True)
    except UserError as error:
        answers_of_rank.append(str(error))
    dist.destroy()
    answers.put(answers_of_rank)


@pytest.mark.distributed
def test_what_takes_rank_0_long_is_waited_for() -> None:
    forks = multiprocessing.get_context("fork")
    answers, port = forks.Queue(), free_port()
    ranks = [forks.Process(target=wait_longer_than_the_timeout, args=(rank, port, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    assert [answers.get(timeout=60) for _ in ranks] == [["uploaded", "no login"]] * 2
    for process in ranks:
        process.join()


def stop_while_the_other_waits(rank: int, port: str, answers: Any) -> None:
    """One of two ranks: rank 0 stops itself (SIGSTOP) in work without a timeout."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    dist.init(torch.device("cpu"), 2)
    try:
        dist.run_on_rank_zero(lambda: os.kill(os.getpid(), signal.SIGSTOP), no_timeout=True)
    except LostRankError as error:
        answers.put(str(error))
        os._exit(0)  # the group cannot be left in good order


@pytest.mark.distributed
def test_a_rank_0_that_is_stopped_is_given_up() -> None:
    forks = multiprocessing.get_context("fork")
    answers = forks.SimpleQueue()
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        forks.Process(target=stop_while_the_other_waits, args=(rank, str(store.port), answers)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        assert "rank 1 waited in the start for rank 0, which gave no sign of life for " in answers.get()
    finally:
        for process in ranks:
            process.kill()
            process.join()


def share_a_token(rank: int, port: str, joins: bool, answers: Any) -> None:
    """One of three ranks, the last of which is late: agrees on the token, then joins the group or ends at once."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    time.sleep(0.1 * (rank == 2))
    token = dist.run_token(20)
    assert dist.run_token(20) == token
    if joins:
        dist.init(torch.device("cpu"), 20)
        assert dist.all_reduce_sum([1.0]) == [3.0]
        dist.destroy()
    answers.put(token)


def spin() -> None:
    """Keep a core busy until killed."""
    while True:
        pass


@pytest.mark.distributed
@pytest.mark.parametrize("joins", [True, False], ids=["then_join", "then_end"])
def test_ranks_share_a_token_before_they_meet(joins: bool) -> None:
    forks = multiprocessing.get_context("fork")
    load = [forks.Process(target=spin, daemon=True) for _ in range(1 + (os.cpu_count() or 1))]
    for process in load:
        process.start()
    try:
        for _ in range(10):  # rank 0 may close its store at any moment: the load varies who comes first
            answers: Any = forks.Queue()
            port = free_port()
            ranks = [forks.Process(target=share_a_token, args=(rank, port, joins, answers)) for rank in range(3)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(60)
            assert [process.exitcode for process in ranks] == [0, 0, 0]
            assert len({answers.get(timeout=5) for _ in ranks}) == 1
    finally:
        for process in load:
            process.kill()


def test_a_process_alone_has_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = set()
    for _ in range(2):
        monkeypatch.setattr(dist, "_run_token", None)
        tokens.add(dist.run_token(1))
        assert dist.run_token(1) in tokens
    assert len(tokens) == 2


ENDS_AT_ONCE = """if True:
    import sys, torch
    from qa_deepspeed.utils import dist
    dist.ensure_rank_env()
    dist.init(torch.device("cpu"), 60)
    group = torch.distributed.group.WORLD  # DeepSpeed's parameters keep it
    sys.setswitchinterval(60)  # no thread takes Python's lock from the main thread
    for _ in range(10):
        torch.distributed.broadcast(torch.ones(1), 0, async_op=True)
    dist.destroy()
"""
"""When the interpreter shuts down, gloo's threads have tensors to free."""


@pytest.mark.distributed
def test_a_process_that_ends_right_after_its_collectives_does_not_abort(tmp_path: Path) -> None:
    done = run([sys.executable, "-c", ENDS_AT_ONCE], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_under_mpirun_a_rank_has_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {theirs: str(n) for n, theirs in enumerate(dist.OPENMPI_NAMES.values())})
    with pytest.raises(UserError, match="-x MASTER_ADDR=HOST -x MASTER_PORT=29500"):
        dist.ensure_rank_env()
    os.environ.update(MASTER_ADDR="node1", MASTER_PORT="29500")
    dist.ensure_rank_env()
    found = {name: os.environ[name] for name in dist.OPENMPI_NAMES}
    assert found == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}
    assert os.environ["MASTER_ADDR"] == "node1"


def test_alone_everything_works_without_a_group(tmp_path: Path) -> None:
    rows = {"id": np.arange(3)}
    gathered = dist.gather_rows(rows)
    assert gathered is not None and gathered["id"] is rows["id"]
    assert dist.all_reduce_sum([1, 2.5]) == [1.0, 2.5]
    assert dist.broadcast_json({"a": 1}) == {"a": 1}
    assert dist.is_first_on_filesystem(tmp_path)
    dist.barrier()
    dist.destroy()
