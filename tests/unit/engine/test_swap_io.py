"""Reads and writes of swap files: any address and type, and an error of the disk is an error of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qa_deepspeed.engine.nvme.swap_io import SwapIO
from qa_deepspeed.utils.errors import StorageError
from tests.unit.small_disk import mounted


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0, 1, 64, 27840])
def test_what_is_written_is_read_at_any_address(tmp_path: Path, kind: torch.dtype, shift: int) -> None:
    """Several at once, as gradients of a sub-group are read into one buffer; what lies around them stays."""
    io = SwapIO(block_size=2**20, queue_depth=8)
    source = io.new_cpu_locked_tensor(4000, torch.zeros(1, dtype=kind)).copy_(torch.randn(4000))
    for part in range(4):
        assert io.async_pwrite(source.narrow(0, 1000 * part, 1000), str(tmp_path / f"{part}"), 0) == 0
    assert io.wait() == 4
    target = torch.full((shift + 4001,), -1.0, dtype=kind)
    for part in range(4):
        assert io.async_pread(target.narrow(0, shift + 1000 * part, 1000), str(tmp_path / f"{part}"), 0) == 0
    assert io.wait() == 4 and io.wait() == 0
    assert torch.equal(target[shift:-1], source) and bool((target[:shift] == -1).all()) and target[-1] == -1


def test_buffers_are_known_to_all_handles() -> None:
    """Also parts of them; until they are freed, or their handle is."""
    one, two = SwapIO(), SwapIO()
    buffer = one.new_cpu_locked_tensor(100, torch.zeros(1))
    assert two.is_pinned(buffer) and two.is_pinned(buffer[10:90]) and not two.is_pinned(torch.zeros(100))
    assert one.free_cpu_locked_tensor(buffer) and not one.is_pinned(buffer) and not one.free_cpu_locked_tensor(buffer)
    kept = one.new_cpu_locked_tensor(100, torch.zeros(1))
    del one
    assert not two.is_pinned(kept)


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    io = SwapIO()
    with mounted(tmp_path / "disk", "size=1m") as disk:
        io.async_pwrite(torch.zeros(2**20), str(disk / "swap"), 0)
        with pytest.raises(StorageError, match=f"cannot write {disk / 'swap'}: No space left on device"):
            io.wait()


def test_a_file_that_ends_early_or_is_missing_is_an_error(tmp_path: Path) -> None:
    io = SwapIO()
    (tmp_path / "short").write_bytes(bytes(100))
    for name, words in (("short", "it is shorter than what was written"), ("none", "No such file or directory")):
        io.async_pread(torch.zeros(26), str(tmp_path / name), 0)
        with pytest.raises(StorageError, match=f"cannot read {tmp_path / name}: {words}"):
            io.wait()
