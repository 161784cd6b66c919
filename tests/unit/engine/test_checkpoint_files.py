"""The manifest finds every kind of damage; old checkpoints are removed, the best and the last stay."""

import json
import os
from pathlib import Path

import pytest

from qa_deepspeed.engine.checkpoints.checkpoint_files import (
    LOOP_FILE,
    MANIFEST_FILE,
    LoopState,
    checkpoint_name,
    checkpoints,
    newest_first,
    read_loop_state,
    remove_leftovers,
    remove_old,
    rename_by_rows,
    verify_checkpoint,
    write_loop_state,
    write_manifest,
)
from qa_deepspeed.engine.checkpoints.shards import Shards, require_shards
from qa_deepspeed.utils.errors import UserError


def written(folder: Path, *steps: int, rate: float = 1e-3, rows: int = 8) -> None:
    """Checkpoints of these steps, written one after another by a run of these settings."""
    for step in steps:
        identity = {"learning_rate": rate, "global_batch_size": rows}
        state = LoopState(step, 2, 2, "fp32", "cpu", identity, 100, [], {}, {}, {}, {})
        (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
        write_loop_state(folder / f"checkpoint-{step}", state)


def names(paths: list[Path]) -> list[str]:
    return [path.name.removeprefix("checkpoint-") for path in paths]


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


def test_a_complete_checkpoint_is_valid(checkpoint: Path) -> None:
    assert verify_checkpoint(checkpoint) is None
    (checkpoint / "notes.txt").write_text("someone's own file does no harm")
    assert verify_checkpoint(checkpoint) is None


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
def test_damage_is_found_and_the_file_is_named(checkpoint: Path, kind: str, name: str) -> None:
    DAMAGES[kind](checkpoint / name)
    found = verify_checkpoint(checkpoint)
    assert found is not None and (name in found or name == MANIFEST_FILE)


def test_a_size_is_compared_before_anything_is_read(checkpoint: Path) -> None:
    """The line says how much is missing, also where every file is damaged."""
    flip_a_bit(checkpoint / "inner" / "config.json")
    truncate(checkpoint / "shard.pt")
    assert verify_checkpoint(checkpoint) == "shard.pt has 1500000 bytes, 3000000 were written"


def test_a_manifest_that_is_written_again_does_not_list_itself(checkpoint: Path) -> None:
    (checkpoint / "added").write_text("x")
    write_manifest(checkpoint)
    assert MANIFEST_FILE not in json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
    assert verify_checkpoint(checkpoint) is None


@pytest.mark.parametrize("content", ["[]", '{"files": 3}', '{"files": {"a": 1}}', '{"files": {"a": {}}}', "\0"])
def test_a_manifest_of_another_shape_is_damage(checkpoint: Path, content: str) -> None:
    (checkpoint / MANIFEST_FILE).write_text(content)
    assert verify_checkpoint(checkpoint) == f"{MANIFEST_FILE} is missing or cannot be read"


def test_a_manifest_of_a_missing_folder_cannot_be_written(tmp_path: Path) -> None:
    assert verify_checkpoint(tmp_path / "checkpoint-9") == "there is no such folder"


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(9, [], [2, 4, 6, 10]), (2, [], [6, 10]), (1, [], [10]), (2, [2], [2, 10]), (1, [2, 4], [2, 4, 10])],
)
def test_the_oldest_are_removed(tmp_path: Path, limit: int, best: list[int], left: list[int]) -> None:
    written(tmp_path, 2, 4, 6, 10)
    (tmp_path / "checkpoint-12.partial").mkdir()
    (tmp_path / "checkpoint-mine").mkdir()
    remove_old(tmp_path, limit, {f"checkpoint-{step}" for step in [*best, 10]})
    assert names(checkpoints(tmp_path)) == [str(step) for step in left]
    remove_leftovers(tmp_path)
    assert (tmp_path / "checkpoint-mine").is_dir() and not (tmp_path / "checkpoint-12.partial").exists()


def test_the_last_written_is_the_newest_at_any_step(tmp_path: Path) -> None:
    """A run that resumed step 4 after step 10 with another rate, then with the first rate again."""
    written(tmp_path, 2, 4, 8, 10)
    written(tmp_path, 6, rate=1e-4)
    first, second = ({"learning_rate": rate, "global_batch_size": 8} for rate in (1e-3, 1e-4))
    assert names(newest_first(tmp_path, second)) == ["6", "10", "8", "4", "2"]
    written(tmp_path, 7)
    assert names(newest_first(tmp_path, first)) == ["7", "10", "8", "4", "2", "6"]
    (tmp_path / "checkpoint-8" / LOOP_FILE).write_text("{")
    assert names(newest_first(tmp_path, first))[0] == "8"  # damaged: reported and skipped
    removed = remove_old(tmp_path, 2, {"checkpoint-7", "checkpoint-4"})
    assert names(removed) == ["8", "2", "10", "6"]  # the damaged one, then as they were written
    assert names(checkpoints(tmp_path)) == ["4", "7"]


def test_checkpoints_of_other_batch_sizes_are_renamed_and_back(tmp_path: Path) -> None:
    written(tmp_path, 20, 40)
    rename_by_rows(tmp_path, 16)
    assert names(checkpoints(tmp_path)) == ["20.batch8", "40.batch8"]
    written(tmp_path, 20, 30, rows=16)
    rename_by_rows(tmp_path, 16)
    assert sorted(names(checkpoints(tmp_path))) == ["20", "20.batch8", "30", "40.batch8"]
    assert checkpoint_name(40, 8, 16) == "checkpoint-40.batch8" and checkpoint_name(30, 16, 16) == "checkpoint-30"
    (tmp_path / "checkpoint-30" / LOOP_FILE).unlink()  # damaged: not renamed
    rename_by_rows(tmp_path, 8)
    assert sorted(names(checkpoints(tmp_path))) == ["20", "20.batch16", "30", "40"]
    assert read_loop_state(tmp_path / "checkpoint-20").identity["global_batch_size"] == 8


def test_the_manifest_names_every_file(checkpoint: Path) -> None:
    listed = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
    assert sorted(listed) == ["empty", "inner/config.json", "shard.pt"]
    assert listed["shard.pt"]["bytes"] == 3_000_000


def test_shards_on_other_disks_are_named(tmp_path: Path) -> None:
    """The names are those that DeepSpeed writes; bfloat16's have a prefix."""
    (tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    (tmp_path / "bf16_zero_pp_rank_10_mp_rank_00_optim_states.pt").touch()
    require_shards(tmp_path, 2, [0, 10])
    require_shards(tmp_path, 0, [3])
    with pytest.raises(UserError, match="has no shards of rank 1, 3 on this disk"):
        require_shards(tmp_path, 3, [0, 1, 3, 10])
    with pytest.raises(UserError, match="has no shards of rank 1 on"):
        Shards(tmp_path, 1, 2, [])
