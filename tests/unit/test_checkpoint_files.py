"""A checkpoint's manifest finds every kind of damage; old checkpoints go, the best and the last stay."""

import json
import os
from pathlib import Path

import pytest

from qa_deepspeed.checkpoint_files import MANIFEST_FILE, checkpoints, damage, remove_old, write_manifest


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Three files, one of them in a folder and one of them empty."""
    folder = tmp_path / "checkpoint-3"
    (folder / "inner").mkdir(parents=True)
    (folder / "shard.pt").write_bytes(os.urandom(3_000_000))
    (folder / "inner" / "config.json").write_text("{}")
    (folder / "empty").touch()
    write_manifest(folder)
    return folder


def test_a_whole_checkpoint_is_whole(checkpoint: Path) -> None:
    assert damage(checkpoint) is None
    (checkpoint / "notes.txt").write_text("someone's own file does no harm")
    assert damage(checkpoint) is None


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": truncate,
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "noise": lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
    "one bit": flip_a_bit,
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["shard.pt", "inner/config.json", MANIFEST_FILE])
def test_damage_of_any_file_is_found_and_the_file_named(checkpoint: Path, kind: str, name: str) -> None:
    DAMAGES[kind](checkpoint / name)
    found = damage(checkpoint)
    assert found is not None and (name in found or name == MANIFEST_FILE)


@pytest.mark.parametrize("content", ["[]", '{"files": 3}', '{"files": {"a": 1}}', '{"files": {"a": {}}}', "\0"])
def test_a_manifest_of_another_shape_is_damage(checkpoint: Path, content: str) -> None:
    (checkpoint / MANIFEST_FILE).write_text(content)
    assert damage(checkpoint) == f"{MANIFEST_FILE} is missing or cannot be read"


def test_a_manifest_cannot_be_written_of_nothing(tmp_path: Path) -> None:
    assert damage(tmp_path / "checkpoint-9") == "there is no such folder"


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(9, [], [2, 4, 6, 10]), (2, [], [6, 10]), (1, [], [10]), (2, [2], [2, 10]), (1, [2, 4], [2, 4, 10])],
)
def test_the_oldest_go_the_best_and_the_last_stay(tmp_path: Path, limit: int, best: list[int], left: list[int]) -> None:
    for step in (2, 4, 6, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-12.partial").mkdir()
    (tmp_path / "checkpoint-mine").mkdir()
    remove_old(tmp_path, limit, best)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]
    assert (tmp_path / "checkpoint-mine").is_dir()


def test_the_manifest_names_every_file(checkpoint: Path) -> None:
    listed = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
    assert sorted(listed) == ["empty", "inner/config.json", "shard.pt"]
    assert listed["shard.pt"]["bytes"] == 3_000_000
