"""Ranks: every exchange with uneven and empty shares, and the same calls alone."""

from pathlib import Path

import numpy as np
import pytest

from qa_deepspeed import dist
from tests.dist.launching import free_port, run
from tests.paths import REPOSITORY


@pytest.mark.distributed
def test_three_ranks(tmp_path: Path) -> None:
    command = ["torchrun", "--nproc_per_node", "3", "--master_port", free_port(), "-m", "tests.dist.collectives"]
    done = run([*command, str(tmp_path)], REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]


def test_alone_everything_works_without_a_group(tmp_path: Path) -> None:
    rows = {"id": np.arange(3)}
    gathered = dist.gather_rows(rows)
    assert gathered is not None and gathered["id"] is rows["id"]
    assert dist.sums([1, 2.5]) == [1.0, 2.5]
    assert dist.broadcast_json({"a": 1}) == {"a": 1}
    assert dist.first_on_this_filesystem(tmp_path)
    dist.barrier()
    dist.stop()
