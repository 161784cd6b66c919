"""A rank that is stopped (SIGSTOP) at a random moment: the other resumes with it, or ends in time with the place."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import flags, run
from tests.paths import REPOSITORY

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TIMEOUT = 10
"""--timeout of the runs, in seconds."""

PAUSE = 2.0
LIMIT = 3 * TIMEOUT
"""Seconds for the other rank to end: a wait in the features and one in a collective, and the time between them."""

CALLS = {"features": 4, "training": 5, "save": 2, "evaluation": 2, "the end": 1}
"""Stage -> calls of its function, counted over both ranks, in which a rank may be stopped."""

PLACE = re.compile(
    r"rank [01] waited in .+ for a rank that has ended or hangs"
    r"|rank 1 waited in .+ for rank 0, which gave no sign of life"
    r"|no progress for \d+ s \(--timeout\), waiting for \S+\.lock \(held by process \d+ on "
)


@pytest.mark.parametrize("stage", CALLS)
def test_the_other_rank_resumes_or_ends_in_time(stage: str, base_options: dict[str, object], tmp_path: Path) -> None:
    """Four random moments in each stage, of which the stopped rank is continued in one."""
    rng = random.Random(f"stopped in {stage}")
    plan: list[dict[str, Any]] = []
    for number in range(4):
        options = {
            **base_options,
            "output_dir": tmp_path / f"run-{number}",
            "cache_dir": tmp_path / (f"cache-{number}" if stage == "features" else "cache"),
            "per_gpu_train_batch_size": 4,
            "max_steps": 4,
            "save_steps": 2,
            "do_eval": True,
            "evaluate_during_training": True,
            "logging_steps": 2,
            "timeout": TIMEOUT,
            "deepspeed_config": f"zero{rng.choice([1, 2])}",
        }
        plan.append(
            {
                "arguments": ["train", *flags(**options)],
                "stage": stage,
                "call": rng.randint(1, CALLS[stage]),
                "delay": rng.uniform(0, 0.6),
                "rank": 0 if stage == "the end" else rng.randrange(2),
                "resumes": number == 3,
                "pause": PAUSE,
                "limit": LIMIT,
            }
        )
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = run(
        [sys.executable, "-m", "tests.distributed.stopped", str(tmp_path / "plan.json"), str(tmp_path)], REPOSITORY
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for number, trial in enumerate(plan):
        outcome = json.loads((tmp_path / f"{number}.json").read_text())
        said = f"trial {number}, {trial['stage']}: {outcome}"
        if trial["resumes"]:
            assert outcome["status"] == [0, 0], said
            continue
        (status,) = outcome["status"]
        printed = outcome["printed"][1 - trial["rank"]]
        assert status in (1, 2), said
        assert outcome["seconds"] < LIMIT, said
        assert PLACE.search(printed), said
        assert "Traceback" not in printed, said
    shutil.rmtree(tmp_path)
