"""Files are whole or not there, and have the permissions of new files."""

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qa_deepspeed.utils.errors import StorageError, UserError
from qa_deepspeed.utils.files import (
    disk_failure,
    disk_message,
    mapped_array,
    move_files,
    os_errors_as_user_errors,
    replacing,
    storage_errors,
    write_bytes,
    write_json,
    write_text,
)
from tests.unit.small_disk import mounted


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


def test_a_mapped_array_without_room_names_the_disk_and_the_bytes(tmp_path: Path) -> None:
    """Mapped without being allocated, it would end the process with SIGBUS at its first use."""
    with mounted(tmp_path / "disk", "size=1m") as disk:
        array = mapped_array(disk, np.dtype(np.float64), 100_000)
        array[:] = 1.0
        with pytest.raises(StorageError, match=f"cannot write {disk}: No space left on device; 800,000 bytes are"):
            mapped_array(disk, np.dtype(np.float64), 100_000)
        assert array.sum() == 100_000 and os.listdir(disk) == []
        del array
        assert mapped_array(disk, np.dtype(np.int16), 0).shape == (0,)


def test_a_mapped_array_is_allocated_where_the_system_has_no_call_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    array = mapped_array(tmp_path, np.dtype(np.float64), 200_000)
    assert array.shape == (200_000,) and not array.any()


def test_a_full_disk_is_recognized_whichever_library_says_so(tmp_path: Path) -> None:
    tensors = {"weights": torch.zeros(1_000_000)}
    with mounted(tmp_path / "disk", "size=1m") as disk:
        for write in (
            lambda: save_file(tensors, disk / "model.safetensors"),
            lambda: torch.save(tensors, disk / "model.pt"),
            lambda: write_bytes(disk / "model.bin", bytes(4_000_000)),
        ):
            with pytest.raises(StorageError, match=f"cannot write {disk}"), storage_errors(disk):
                write()
    assert disk_failure(Exception("No space left on device (os error 28)")) == "No space left on device"
    assert disk_failure(OSError(errno.ENOENT, "No such file")) is None and disk_failure(ValueError("other")) is None


def test_other_errors_of_the_system_are_the_users(tmp_path: Path) -> None:
    words = "cannot write out: No such file or directory"
    with pytest.raises(UserError, match=words) as caught, os_errors_as_user_errors(Path("out")):
        (tmp_path / "missing" / "file").write_text("")
    assert not isinstance(caught.value, StorageError)


def test_a_failed_replacement_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, replacing(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert disk_message(caught.value) == f"cannot write {tmp_path / 'file'}: No space left on device"
    assert disk_message(OSError(errno.EIO, "")) == "cannot read or write a file: Input/output error"
