"""The script for a machine with a GPU works: its tiny mode, on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import run
from tests.paths import REPOSITORY, SHARED

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not (SHARED / "peers").is_dir(), reason=f"no peer to compare with in {SHARED}"),
]


def test_it_measures_ours_and_the_peers_and_leaves_a_table(tmp_path: Path) -> None:
    script = REPOSITORY / "tests" / "gpu" / "check.sh"
    done = run([str(script), str(tmp_path / "out"), "--tiny"], tmp_path, PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    records = [json.loads(line) for line in (tmp_path / "out" / "steps.jsonl").read_text().splitlines()]
    assert [one["who"] for one in records] == ["ours", "peer tuned"]
    assert all(one["tokens"] > 0 and one["seconds"] > 0 and one["steps"] == 4 for one in records)
    assert records[0]["padding"] == 0.0 and records[0]["forward_ms"] > 0
    assert (tmp_path / "out" / "steps.md").read_text().count("| tiny | 4 |") == 2
    assert "torch" in (tmp_path / "out" / "machine.txt").read_text()
