"""Files are whole or not there, and have the permissions of new files."""

import os
import stat
from pathlib import Path

import pytest

from qa_deepspeed.utils.files import move_files, replacing, write_bytes, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800", errors="strict")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        1 / 0  # noqa: B018
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_new_file_has_the_permissions_of_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "file.json", {"lone": "\ud800"})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.json").stat().st_mode) == 0o640
    assert (tmp_path / "file.json").read_text() == '{\n  "lone": "\\ud800"\n}\n'


def test_files_are_moved_over_those_of_the_same_name(tmp_path: Path) -> None:
    for folder, text in (("source", "new"), ("target", "old")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one").write_text(text)
    move_files(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target/one").read_text() == "new" and not (tmp_path / "source").exists()


def test_bytes_are_written_whole_under_a_temporary_name(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as temporary:
        assert temporary.parent == tmp_path and temporary.match(".file.*.tmp")
    write_bytes(tmp_path / "file", memoryview(b"\x00new"))
    assert (tmp_path / "file").read_bytes() == b"\x00new" and os.listdir(tmp_path) == ["file"]


def test_bytes_of_a_file_name_that_are_not_utf8_are_written_escaped(tmp_path: Path) -> None:
    name = os.fsdecode(b"data-\xe9.json")
    write_text(tmp_path / "card.md", name)
    assert (tmp_path / "card.md").read_text() == "data-\\udce9.json"
