"""Ranks: every exchange with uneven and empty shares, and the same calls alone."""

import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
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
