"""The trace of a few steps: which steps, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qa_deepspeed.training.reporting.profiler import StepProfiler, profiled_steps
from qa_deepspeed.utils.errors import UserError


def test_steps_of_a_text() -> None:
    assert list(profiled_steps("10-12")) == [10, 11, 12] and list(profiled_steps(" 3 ")) == [3]
    assert not profiled_steps(None)
    for text in ("0", "3-2", "a", "1-2-3", "", "-4"):
        with pytest.raises(UserError, match=f"profile_steps '{text}' must be a step like 10, or steps like 10-12"):
            profiled_steps(text)


def traced(folder: Path, text: str | None, first: int, last: int) -> list[set[str]]:
    """Run steps first + 1 to last, each of which multiplies two matrices; the steps named in each trace."""
    profiler = StepProfiler(text, folder, first)
    for number in range(first + 1, last + 1):
        profiler.begin(number)
        torch.ones(8, 8) @ torch.ones(8, 8)
        profiler.end(number)
    profiler.close()
    found = []
    for file in sorted((folder / "tensorboard").glob("*.pt.trace.json")):
        events = [event.get("name", "") for event in json.loads(file.read_text())["traceEvents"]]
        assert "aten::mm" in events
        found.append({name for name in events if name.startswith("ProfilerStep#")})
    return found


@pytest.mark.parametrize(
    ("text", "first", "last", "steps"),
    [
        ("3-4", 0, 6, [2]),
        ("1", 0, 3, [1]),  # no step before it to warm up in
        ("3-9", 0, 5, [4]),  # the run ends before: torch has marked the begin of the next step
        ("3-4", 3, 6, [1]),  # resumed amid them
        ("3-4", 5, 6, []),  # resumed after them
        (None, 0, 3, []),
    ],
)
def test_a_trace_has_the_steps(tmp_path: Path, text: str | None, first: int, last: int, steps: list[int]) -> None:
    assert [len(names) for names in traced(tmp_path, text, first, last)] == steps
