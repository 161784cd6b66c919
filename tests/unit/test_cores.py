"""Cores divided among ranks: every rank its own, and what the user said is left alone."""

import os
import subprocess
import sys

import pytest

from qa_deepspeed.cores import cores_of
from tests.paths import REPOSITORY

CORES = len(os.sched_getaffinity(0))
TELL = "import torch; from qa_deepspeed.cores import share_cores; share_cores(); print(torch.get_num_threads())"
AS_TORCHRUN = f"""if True:
    import os, subprocess, sys
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    subprocess.run([sys.executable, "-c", {TELL!r}], check=True)
"""


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_rank_has_cores_of_its_own(ranks: int) -> None:
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
        (TELL, {"LOCAL_WORLD_SIZE": str(2 * CORES)}, 1),
    ],
    ids=["torchrun_alone", "one_asked_for", "deepspeed_launcher"],
)
def test_threads(code: str, environment: dict[str, str], threads: int) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID")}
    done = subprocess.run([sys.executable, "-c", code], env=kept | environment, cwd=REPOSITORY, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) == threads
