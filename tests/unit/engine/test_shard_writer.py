"""Copies of state dicts, and checkpoints that a thread writes from them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qa_deepspeed.engine.checkpoints import checkpoint
from qa_deepspeed.engine.checkpoints.checkpoint import CheckpointWriter
from qa_deepspeed.engine.checkpoints.checkpoint_files import verify_checkpoint
from qa_deepspeed.engine.checkpoints.shard_writer import ShardWriter, copied
from qa_deepspeed.utils.errors import LostRankError, UserError
from tests.unit.engine.test_checkpoint import StandIn, failing, state


def test_a_copy_does_not_follow_the_original() -> None:
    weight = torch.arange(6.0).view(2, 3)
    original = {"a": [weight, weight[1]], "b": (weight, 3), "c": OrderedDict(x=torch.ones(2, requires_grad=True))}
    copy = copied(original)
    weight.fill_(7)
    assert copy["a"][0].tolist() == [[0, 1, 2], [3, 4, 5]] and copy["a"][1].tolist() == [3, 4, 5]
    assert copy["b"][0] is copy["a"][0] and copy["b"][1] == 3  # torch.save writes it once
    assert type(copy["c"]) is OrderedDict and not copy["c"]["x"].requires_grad
    assert isinstance(original["c"], OrderedDict) and original["c"]["x"].requires_grad


def test_empty_tensors_keep_their_shapes() -> None:
    copy = copied([torch.empty(0, 3), torch.empty(2, 0), torch.empty(0)])
    assert [tuple(one.shape) for one in copy] == [(0, 3), (2, 0), (0,)]


class TorchWriter:
    def save(self, state_dict: Any, path: str) -> None:
        torch.save(state_dict, path)


def test_what_is_written_is_what_was_copied(tmp_path: Path) -> None:
    writer, weight = ShardWriter(TorchWriter()), torch.zeros(1000)
    for number in range(2):
        with writer.copying() as write:
            writer.save({"weight": weight, "number": number}, str(tmp_path / f"{number}.pt"))
        weight.fill_(number + 1)
        assert not (tmp_path / f"{number}.pt").exists()
        write()
        loaded = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert loaded["number"] == number and loaded["weight"].eq(number).all()
    writer.save({"weight": weight}, str(tmp_path / "now.pt"))
    assert torch.load(tmp_path / "now.pt", weights_only=True)["weight"].eq(2).all()


def test_a_write_that_fails_is_an_error_of_the_disk(tmp_path: Path) -> None:
    writer = ShardWriter(TorchWriter())
    with writer.copying() as write:
        writer.save({"weight": torch.zeros(3)}, str(tmp_path / "no folder" / "0.pt"))
    with pytest.raises(OSError, match="no folder"):
        write()


class FullDisk:
    def save(self, state_dict: Any, path: str) -> None:
        raise OSError(28, "No space left on device", path)


def test_a_full_disk_keeps_its_error() -> None:
    writer = ShardWriter(FullDisk())
    with writer.copying() as write:
        writer.save({}, "0.pt")
    with pytest.raises(OSError, match="No space left on device") as raised:
        write()
    assert raised.value.errno == 28 and raised.value.filename == "0.pt"


class Slow(StandIn):
    """Its files are written when `may_write` is set."""

    zero_stage = 1

    def __init__(self) -> None:
        super().__init__()
        self.value, self.may_write = b"first", threading.Event()

    def copy_shards(self, folder: Path, tag: str) -> Callable[[], None]:
        content = self.value

        def write() -> None:
            assert self.may_write.wait(30)
            (folder / tag / "shard.pt").write_bytes(content)

        return write


def test_training_continues_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    engine = Slow()
    writer = CheckpointWriter(engine, tmp_path, None, "true")  # type: ignore[arg-type]
    assert writer.save(state(2)) is None
    engine.value = b"second"
    assert not (tmp_path / "checkpoint-2").exists()
    engine.may_write.set()
    writer.save(state(4))  # waits for the one before
    assert verify_checkpoint(tmp_path / "checkpoint-2") is None
    writer.wait()
    found = [(tmp_path / f"checkpoint-{step}" / "shard.pt").read_bytes() for step in (2, 4)]
    assert found == [b"first", b"second"] and verify_checkpoint(tmp_path / "checkpoint-4") is None


def test_a_failed_write_costs_its_checkpoint_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Slow()
    engine.may_write.set()
    writer = CheckpointWriter(engine, tmp_path, 1, "true")  # type: ignore[arg-type]
    writer.save(state(2))
    writer.save(state(4), failing(OSError(28, "No space left on device")))
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert "checkpoint-4 was NOT saved; training continues" in capsys.readouterr().out
    writer.save(state(6))
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]  # the limit is 1


def test_what_replaces_another_run_is_written_at_once(tmp_path: Path) -> None:
    engine = Slow()
    writer = CheckpointWriter(engine, tmp_path, None, "true")  # type: ignore[arg-type]
    assert writer.save(state(2), at_once=True) == tmp_path / "checkpoint-2"


def test_without_memory_for_copies_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said once."""
    monkeypatch.setattr(checkpoint, "free_host_memory", lambda: 100)
    writer = CheckpointWriter(Slow(), tmp_path, None, "auto")  # type: ignore[arg-type]
    assert writer.save(state(2)) is not None and writer.save(state(4)) is not None
    assert capsys.readouterr().out.count("training waits for each checkpoint: no host memory") == 1
    monkeypatch.setattr(checkpoint, "free_host_memory", lambda: 10**9)
    assert writer.save(state(6)) is None  # in the background


def test_a_run_that_ends_on_a_users_error_completes_its_checkpoint(tmp_path: Path) -> None:
    for error, there in ((UserError("the loss is NaN"), True), (LostRankError("rank 1 has ended"), False)):
        engine, folder = Slow(), tmp_path / type(error).__name__
        folder.mkdir()
        timer = threading.Timer(0.5, engine.may_write.set)
        timer.start()
        with pytest.raises(type(error)), CheckpointWriter(engine, folder, None, "true") as writer:  # type: ignore[arg-type]
            writer.save(state(2))
            raise error
        assert (folder / "checkpoint-2").exists() == there
        timer.join()
        writer.wait()
