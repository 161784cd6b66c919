"""A run with trackers: CSV files beside TensorBoard, no secret in what is saved, and a run that reports nowhere."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.launching import run_many
from tests.unit.training.events import events

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SECRET = "b7c0ffee5ec4e7"


@pytest.fixture(scope="module")
def runs(base_options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that reports to CSV files and TensorBoard, one whose config has monitors, and one without."""
    folder: Path = tmp_path_factory.mktemp("trackers")
    short = {**base_options, "max_steps": 4, "save_steps": 2, "do_eval": True, "max_eval_examples": 8}
    mine = {
        "zero_optimization": {"stage": 1},
        "csv_monitor": {"enabled": True, "output_path": str(folder / "shared"), "job_name": "mine"},
        "comet": {"enabled": False, "api_key": SECRET},
        "wandb": {"enabled": False, "team": "t"},
    }
    (folder / "mine.json").write_text(json.dumps(mine))
    own = {**short, "deepspeed_config": str(folder / "mine.json")}
    csv_too = {**short, "deepspeed_config": "zero2", "report_to": "tensorboard,csv_monitor", "run_name": "first"}
    csv_too |= {"profile_steps": "2-3"}
    quiet = {**short, "deepspeed_config": "zero2", "report_to": "none"}
    run_many(2, {"csv": csv_too, "own": own, "quiet": quiet}, folder)
    return folder


@pytest.mark.parametrize(("name", "where"), [("csv", "csv/csv_monitor/first"), ("own", "shared/mine")])
def test_csv_files_hold_the_numbers_of_tensorboard(runs: Path, name: str, where: str) -> None:
    board = events(runs / name)
    tags = {tag for tag in board.Tags()["scalars"] if not tag.startswith("Overview/") and "/" in tag}
    assert {"train/loss", "train/learning_rate", "eval/f1", "speed/tokens_per_second"} <= tags
    files = {path.stem: path for path in (runs / where).iterdir()}
    assert set(files) == {tag.replace("/", "_").replace(" ", "_") for tag in tags}
    for tag in tags:
        with open(files[tag.replace("/", "_").replace(" ", "_")], newline="") as file:
            _, *points = csv.reader(file)
        expected = [(point.step, np.float32(point.value)) for point in board.Scalars(tag)]
        assert [(int(step), np.float32(value)) for step, value in points] == expected, tag


def test_a_trace_holds_the_steps_that_were_asked_for(runs: Path) -> None:
    """And the work of each; the step before them is a warm-up of the profiler."""
    (file,) = (runs / "csv/tensorboard").glob("rank0.*.pt.trace.json")
    named = [event.get("name", "") for event in json.loads(file.read_text())["traceEvents"]]
    assert len({name for name in named if name.startswith("ProfilerStep#")}) == 2
    assert any(name.startswith("aten::") for name in named) and any("AdamW.step" in name for name in named)
    assert not list((runs / "own").rglob("*.pt.trace.json"))


def test_no_secret_is_saved(runs: Path) -> None:
    files = [path for path in (runs / "own").rglob("*") if path.is_file()]
    assert any(path.name == "run.json" for path in files) and len(files) > 10
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_report_to_none_leaves_tensorboard_out(runs: Path) -> None:
    assert not (runs / "quiet/tensorboard").exists() and (runs / "quiet/metrics.jsonl").exists()
    losses = [json.loads(line).get("train/loss") for line in (runs / "quiet/metrics.jsonl").read_text().splitlines()]
    assert len([loss for loss in losses if loss]) == 4
