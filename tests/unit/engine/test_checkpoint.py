"""Saves of a stand-in engine: training continues after a failed one, the best and the last checkpoint stay."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from qa_deepspeed.engine.checkpoints.checkpoint import CheckpointWriter
from qa_deepspeed.engine.checkpoints.checkpoint_files import LoopState, checkpoints, verify_checkpoint
from tests.unit.small_disk import mounted


class StandIn:
    """Writes `size` random bytes where an engine writes its shards."""

    parameters = trained_parameters = 10

    def __init__(self, size: int = 1000) -> None:
        self.size = size

    def write_common_states(self) -> None:
        """Nothing to set: its one file is every rank's."""

    def save_shards(self, folder: Path, tag: str) -> None:
        (folder / tag / "shard.pt").write_bytes(os.urandom(self.size))


def state(step: int) -> LoopState:
    return LoopState(step, 1, 0, "fp32", "cpu", {"global_batch_size": 8}, 100, [], {}, {}, {}, {})


def failing(error: Exception) -> Callable[[Path], None]:
    def add_files(folder: Path) -> None:
        raise error

    return add_files


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: No space left on device"),
        Exception("No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed: No space left"),
    ],
)
def test_training_continues_after_any_error_of_a_full_disk(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = CheckpointWriter(StandIn(), tmp_path, None)  # type: ignore[arg-type]
    assert writer.save(state(2)) is not None
    assert writer.save(state(4), failing(error)) is None
    printed = capsys.readouterr().out
    assert "cannot save a checkpoint: " in printed and "No space left" in printed
    assert "checkpoint-4 was NOT saved; training continues, earlier checkpoints are untouched" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"] and verify_checkpoint(
        tmp_path / "checkpoint-2"
    ) is None
    assert writer.save(state(6)) is not None


def test_the_limit_spares_the_best_and_the_last_checkpoint(tmp_path: Path) -> None:
    """Also if checkpoints of earlier settings with higher steps are in the folder."""
    writer = CheckpointWriter(StandIn(), tmp_path, 1)  # type: ignore[arg-type]
    for step in (20, 40):
        CheckpointWriter(StandIn(), tmp_path, None).save(state(step))  # type: ignore[arg-type]
    for step in (12, 14, 40):
        writer.save(state(step), keep=["checkpoint-12"])
        assert {path.name for path in checkpoints(tmp_path)} == {"checkpoint-12", f"checkpoint-{step}"}
    assert verify_checkpoint(tmp_path / "checkpoint-40") is None


def test_the_remains_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    for name in ("checkpoint-3.partial", "checkpoint-2.old.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard.pt").touch()
    CheckpointWriter(StandIn(), tmp_path, None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    with mounted(tmp_path / "disk", "size=1m") as folder:
        yield folder


def test_a_full_disk_is_reported_in_either_phase(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = StandIn(600_000)
    writer = CheckpointWriter(engine, small_disk, None)  # type: ignore[arg-type]
    assert writer.save(state(2)) is not None
    assert writer.save(state(4)) is None
    assert "0.00 GB free at" in capsys.readouterr().out  # the first one says how much is needed
    engine.parameters = 1
    again = CheckpointWriter(engine, small_disk, None)  # type: ignore[arg-type]
    assert again.save(state(4)) is None
    assert "No space left on device" in capsys.readouterr().out
    assert [path.name for path in small_disk.iterdir()] == ["checkpoint-2"]
    assert verify_checkpoint(small_disk / "checkpoint-2") is None
