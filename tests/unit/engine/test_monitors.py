"""Trackers: which sections of a DeepSpeed config are enabled, and the numbers that reach them."""

from __future__ import annotations

import csv
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qa_deepspeed.config.option_groups import TRACKERS
from qa_deepspeed.config.run_options import RunOptions, check_counts
from qa_deepspeed.engine import config_check, ds_config, monitors
from qa_deepspeed.engine.monitors import Monitors, enabled_monitors, fill_monitors, without_monitors
from qa_deepspeed.training.reporting.reporter import MetricsLogger
from qa_deepspeed.utils.errors import UserError
from tests.unit.training.events import events


@pytest.fixture(autouse=True)
def every_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_check, "_is_installed", lambda package: True)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


def filled(config: dict[str, Any], **settings: Any) -> tuple[dict[str, Any], list[str]]:
    conflicts: list[str] = []
    fill_monitors(config, RunOptions(output_dir="runs/one", **settings), "mine.json", conflicts)
    return config, conflicts


def test_report_to_enables_the_sections_that_it_names() -> None:
    config, conflicts = filled({"comet": {"enabled": "auto"}}, report_to="tensorboard, wandb,csv_monitor")
    assert conflicts == [] and enabled_monitors(config) == ["wandb", "csv_monitor"]
    assert config["csv_monitor"] == {"enabled": True, "output_path": "runs/one/csv_monitor", "job_name": "one"}
    assert config["wandb"] == {"enabled": True, "project": "qa_deepspeed"} and config["comet"] == {"enabled": False}
    assert without_monitors({**config, "bf16": {}}) == {"bf16": {}}


def test_the_sections_of_a_config_stay_where_nothing_is_asked() -> None:
    mine = {"csv_monitor": {"enabled": True, "output_path": "logs"}, "wandb": {"enabled": False}}
    config, conflicts = filled({name: dict(section) for name, section in mine.items()})
    assert config == mine and conflicts == []
    config, _ = filled({"csv_monitor": {"enabled": True}, "comet": {"enabled": True}}, run_name="second")
    assert config["csv_monitor"]["job_name"] == "second" and config["comet"]["experiment_name"] == "second"


@pytest.mark.parametrize(
    ("config", "report_to", "conflict"),
    [
        ({"wandb": {"enabled": True}}, "none", "wandb.enabled is true in mine.json, report_to is none"),
        ({"wandb": {"enabled": True}}, "tensorboard", "wandb.enabled is true in mine.json, report_to is tensorboard"),
        ({"comet": {"enabled": False}}, "comet", "comet.enabled is false in mine.json, report_to is comet"),
    ],
)
def test_config_and_report_to_must_agree(config: dict[str, Any], report_to: str, conflict: str) -> None:
    assert filled(config, report_to=report_to)[1] == [conflict]


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_check, "_is_installed", lambda package: False)
    options = RunOptions(report_to="wandb")
    config = ds_config.resolve(options, 1, "cpu").config  # `plan` needs no tracker
    with pytest.raises(UserError, match="report_to wandb: wandb.enabled needs the package wandb: pip install wandb"):
        monitors.require_packages(config, options)
    options = RunOptions(report_to="csv_monitor,tensorboard")
    monitors.require_packages(ds_config.resolve(options, 1, "cpu").config, options)


def test_none_excludes_the_others() -> None:
    assert RunOptions().trackers == {"tensorboard"} and RunOptions(report_to="none").trackers == set()
    with pytest.raises(UserError, match="none excludes the others"):
        check_counts(RunOptions(report_to="wandb, none"))


@pytest.fixture
def first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's monitors ask for the rank, which a process without a process group has not."""
    import deepspeed.comm

    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda group=None: 0)


def started(folder: Path, done_steps: int = 0, **config: Any) -> Monitors:
    options = RunOptions(output_dir=str(folder), report_to="csv_monitor" if not config else None)
    fill_monitors(config, options, "", [])
    return Monitors(config, options, done_steps)


def rows(folder: Path, tag: str) -> list[list[str]]:
    """The rows of a curve's CSV file, the header too."""
    with open(folder / "csv_monitor" / folder.name / f"{tag.replace('/', '_')}.csv", newline="") as file:
        return list(csv.reader(file))


def test_csv_files_hold_the_numbers_of_tensorboard_on_resume_too(tmp_path: Path, first_rank: None) -> None:
    values = {"train/loss": 1 / 3, "eval/f1": 81.25, "train/epoch": 0.5}
    logger = MetricsLogger(tmp_path, 10, 0, monitors=started(tmp_path))
    for step in range(1, 8):
        logger.log(step, {tag: value * step for tag, value in values.items()}, "")
    logger.close()
    again = MetricsLogger(tmp_path, 10, 4, monitors=started(tmp_path, 4))
    for step in range(5, 11):
        again.log(step, {tag: -value * step for tag, value in values.items()}, "")
    again.close()
    board = events(tmp_path)
    tags = [tag for tag in board.Tags()["scalars"] if not tag.startswith("Overview/")]
    assert sorted(tags) == ["eval/f1", "train/loss"]
    assert len(list((tmp_path / "csv_monitor" / tmp_path.name).iterdir())) == len(tags)
    for tag in tags:
        header, *points = rows(tmp_path, tag)
        assert header == ["step", tag.split("/")[1]]
        assert [(int(step), np.float32(value)) for step, value in points] == [
            (point.step, np.float32(point.value)) for point in board.Scalars(tag)
        ]
        assert len(points) == 10


def test_files_outside_of_the_run_are_only_added_to(tmp_path: Path, first_rank: None) -> None:
    section = {"enabled": True, "output_path": str(tmp_path / "shared"), "job_name": "job"}
    for _ in range(2):
        started(tmp_path / "run", csv_monitor=dict(section)).write(3, {"train/loss": 1.0})
    lines = (tmp_path / "shared/job/train_loss.csv").read_text().split()
    assert lines == ["step,loss", "3,1.0"] * 2


class FakeWandb(types.ModuleType):
    """Records what DeepSpeed's monitor sends."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []

    def init(self, **settings: Any) -> None:
        self.calls.append(("init", settings))

    def log(self, data: dict[str, float], step: int, commit: Any = None) -> None:
        self.calls.append(("log", (data, step)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, first_rank: None) -> Iterator[FakeWandb]:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("deepspeed.monitor.wandb.check_wandb_availability", lambda: None)
    for name in ("WANDB_NAME", "WANDB_DIR"):
        monkeypatch.setenv(name, "")  # so that what the run sets is removed after the test
        monkeypatch.delenv(name)
    yield fake


def test_wandb_gets_the_curves_at_optimizer_steps(tmp_path: Path, wandb: FakeWandb) -> None:
    logger = MetricsLogger(tmp_path, 4, 0, board=False, monitors=started(tmp_path, wandb={"enabled": True}))
    for step in (2, 4):
        logger.log(step, {"train/loss": step / 2, "train/epoch": 1.0}, "")
    logger.close()
    assert [kind for kind, _ in wandb.calls] == ["init", "log", "log", "finish"]
    assert [call for kind, call in wandb.calls if kind == "log"] == [({"train/loss": 1.0}, 2), ({"train/loss": 2.0}, 4)]
    assert not (tmp_path / "tensorboard").exists()


def test_a_tracker_that_cannot_start_is_one_line(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**settings: Any) -> None:
        raise RuntimeError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        UserError, match=r"wandb cannot start \(RuntimeError: api_key not configured \(no-tty\)\): log in"
    ):
        started(tmp_path, wandb={"enabled": True})


def test_a_tracker_that_fails_later_costs_its_curves_alone(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trackers = started(tmp_path, wandb={"enabled": True})

    def lost(*arguments: Any, **named: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(wandb, "log", lost)
    for step in (1, 2):
        trackers.write(step, {"train/loss": 1.0})
    trackers.close()
    said = "the trackers of the DeepSpeed config fail (ConnectionError: no route to host): the run continues"
    assert capsys.readouterr().out.count(said) == 1


def test_trackers_are_deepspeeds_sections() -> None:
    from deepspeed.monitor.config import DeepSpeedMonitorConfig

    assert set(monitors.SECTIONS) == set(DeepSpeedMonitorConfig.model_fields)
    assert set(TRACKERS) < set(monitors.SECTIONS)


def test_the_real_wandb_offline(tmp_path: Path, first_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed: a run's file holds the name and every point."""
    real = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_NAME", "first")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    logger = MetricsLogger(tmp_path, 4, 0, monitors=started(tmp_path, wandb={"enabled": True}))
    for step in (2, 4):
        logger.log(step, {"train/loss": step / 8, "eval/f1": 12.5 * step}, "")
    logger.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    data = file.read_bytes()
    assert b"train/loss" in data and b"0.25" in data and b"0.5" in data and b"eval/f1" in data
    assert real.run is None
