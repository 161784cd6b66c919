"""The holder of a lock names itself in a file beside it."""

import os
import socket
from pathlib import Path

import pytest

from qa_deepspeed.utils.locks import Holder


@pytest.mark.parametrize("name", ["features-00001.lock", ".lock", "lock"])
def test_a_holder_is_read_and_cleared(tmp_path: Path, name: str) -> None:
    holder = Holder(tmp_path / name)
    assert holder.read() == "an unknown process"
    holder.note()
    assert Holder(tmp_path / name).read() == f"process {os.getpid()} on {socket.gethostname()}"
    assert [path.name for path in tmp_path.iterdir()] == [f".{name.lstrip('.').removesuffix('.lock')}.holder"]
    holder.clear()
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_and_a_folder_that_cannot_be_written_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / ".one.holder").write_bytes(b"\xff\xfe")
    assert Holder(tmp_path / "one.lock").read()
    (tmp_path / ".one.holder").write_bytes(b"")
    assert Holder(tmp_path / "one.lock").read() == "an unknown process"
    gone = Holder(tmp_path / "gone" / "one.lock")
    gone.note()
    gone.clear()
    assert gone.read() == "an unknown process"
