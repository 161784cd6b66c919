"""The metrics logger: curves and metrics.jsonl of a resumed run, without gap or overlap."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from qa_deepspeed.training.reporting.reporter import MetricsLogger, _keep_lines
from tests.unit.damage import DAMAGE
from tests.unit.small_disk import mounted
from tests.unit.training.events import events


def test_resumed_run_continues_its_curves_without_overlap(tmp_path: Path) -> None:
    first = MetricsLogger(tmp_path, 10, 0)
    for step in range(1, 8):
        first.log(step, {"train/loss": float(step)}, "")
    first.close()
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 8, "tr')  # cut off in mid-line
    again = MetricsLogger(tmp_path, 10, 4)
    for step in range(5, 11):
        again.log(step, {"train/loss": 100.0 + step}, "")
    again.close()
    expected = [(step, float(step)) for step in range(1, 5)] + [(step, 100.0 + step) for step in range(5, 11)]
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("train/loss")] == expected
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == expected


def test_damaged_lines_are_named_once_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [b'{"step": %d, "train/loss": 1.0}' % step for step in range(1, 5)]
    bad = [b"5", b"[]", b"null", b'{"step": "2"}', b'{"step": 3, "train/loss": \xff}', b"{}", b"{"]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*good[:2], *bad, b"", *good[2:], b'{"step": 5, "tr']))
    MetricsLogger(tmp_path, 10, 4).close()
    assert path.read_bytes().splitlines() == good
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "metrics.jsonl" in line)
    assert line.startswith(f"{path}: 7 lines left out as damaged (line 3: ")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=DAMAGE)
def test_no_damage_ends_a_resume(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    lines = [json.dumps({"step": step, "train/loss": 1.0}) for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_bytes(damage("\n".join([*lines, ""]).encode()))
    _keep_lines(tmp_path / "metrics.jsonl", 3)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] <= 3


def test_restart_without_checkpoint_purges_the_first_run(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        reporter = MetricsLogger(tmp_path, 10, 0)
        reporter.log(1, {"train/loss": value}, "")
        reporter.close()
    assert [event.value for event in events(tmp_path).Scalars("train/loss")] == [2.0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_counts_and_thresholds_are_no_curves(tmp_path: Path) -> None:
    values = {"train/loss": 1.0, "train/epoch": 2.0, "eval/f1": 50.0, "eval/HasAns_f1": 60.0, "eval/best_f1": 55.0}
    numbers = {"eval/total": 10.0, "eval/NoAns_total": 4.0, "eval/best_f1_thresh": -1.0}
    numbers |= {"eval/null_score_diff_threshold": -1.5, "eval/tuned_f1": 56.0, "eval/untuned_f1": 40.0}
    logger = MetricsLogger(tmp_path, 10, 0)
    logger.log(1, values | numbers, "")
    logger.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, **values, **numbers}
    curves = {tag for tag in events(tmp_path).Tags()["scalars"] if not tag.startswith("Overview/")}
    assert curves == set(values) - {"train/epoch"}


def fill(folder: Path) -> Path:
    """A file that takes all room that is left."""
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return folder / "filler"


def test_a_full_disk_is_reported_once_and_lines_follow_when_there_is_room(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = {f"train/{number}": float(number) for number in range(300)}  # more than the rest of a block
    with mounted(tmp_path / "disk", "size=2m") as disk:
        logger = MetricsLogger(disk, 10, 0)
        logger.log(1, values, "step 1")
        filler = fill(disk)
        for step in (2, 3, 4):
            logger.log(step, values, f"step {step}")
        filler.unlink()
        logger.log(5, values, "step 5")
        logger.close()
        lines = [json.loads(line) for line in (disk / "metrics.jsonl").read_text().splitlines()]
        assert lines == [{"step": step, **values} for step in range(1, 6)]
        assert events(disk).Scalars("train/1")[0].step == 1
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed and "step 4" in printed
    assert printed.count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert printed.count("tensorboard is no longer written (No space left on device); the run continues") == 1


def test_a_disk_that_is_full_from_the_start_costs_the_log_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        (disk / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
        fill(disk)
        logger = MetricsLogger(disk, 10, 1)
        logger.log(2, {f"train/{number}": 1.0 for number in range(300)}, "step 2")
        logger.close()
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed and "step 2" in printed
    assert printed.count("metrics.jsonl is no longer written") == printed.count("tensorboard is no longer written") == 1
