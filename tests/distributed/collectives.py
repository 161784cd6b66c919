"""One rank of a launch that tries `dist` with uneven rows: `-m tests.distributed.collectives FOLDER`."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.device import choose_device
from qa_deepspeed.runs.folder import require_whole_checkpoints
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError


def gather_by_broadcasts(rank: int, world_size: int) -> None:
    """Every rank's part at its place, as torch's own gather has it: of all ranks, and of a group that begins later."""
    for first in (0, world_size // 2):
        group = torch.distributed.new_group(list(range(first, world_size)), backend="gloo")
        if rank < first:
            continue
        ranks = torch.arange(first, world_size)
        expected = (ranks[:, None] * 100.0 + torch.arange(6.0)).reshape(-1, 3)
        for in_place, waits in ((False, True), (True, False)):
            whole = torch.zeros(2 * len(ranks), 3)
            mine = whole[2 * (rank - first) :][:2] if in_place else torch.zeros(2, 3)
            mine.copy_(rank * 100.0 + torch.arange(6.0).reshape(2, 3))
            works = dist.gather_by_broadcasts(whole, mine, group, async_op=not waits)
            assert (works is None) == waits
            if works is not None:
                works.wait()
            assert torch.equal(whole, expected)


def main() -> None:
    """Assert on every rank; a failed assertion ends the launch with an error."""
    dist.GATHER_ROWS = 5  # several exchanges
    device = choose_device(no_cuda=False)  # the environment of a launch on CPUs hides the GPUs
    dist.init(device, 60)
    rank, world_size = dist.rank(), dist.world_size()
    assert torch.distributed.get_backend() == ("nccl" if device.type == "cuda" else "gloo")
    total = torch.full((3,), rank + 1.0, device=device)
    torch.distributed.all_reduce(total)
    assert total.tolist() == [world_size * (world_size + 1) / 2] * 3
    for total in (0, 1, 7, 23):
        mine = np.arange(total)[rank::world_size] if total != 7 else np.arange(7)[: 7 if rank == world_size // 2 else 0]
        arrays = {
            "id": mine.astype(np.int64),
            "pair": np.stack([mine, -mine], 1).astype(np.int32),
            "score": mine / np.float32(3),
        }
        arrays["score"] = arrays["score"].astype(np.float32)
        gathered = dist.gather_rows(arrays)
        assert (gathered is None) == (rank != 0)
        if gathered is not None:
            order = np.argsort(gathered["id"])
            assert np.array_equal(gathered["id"][order], np.arange(total))
            assert np.array_equal(gathered["pair"][order], np.stack([np.arange(total), -np.arange(total)], 1))
            assert np.array_equal(gathered["score"][order], (np.arange(total) / np.float32(3)).astype(np.float32))
            assert gathered["pair"].dtype == np.int32
    gather_by_broadcasts(rank, world_size)
    assert dist.all_reduce_sum([rank, 1.5]) == [sum(range(world_size)), 1.5 * world_size]
    assert dist.all_reduce_max([rank, -rank, 1.5]) == [world_size - 1, 0, 1.5]
    value = {"f1": 0.1 + 0.2, "text": "日本 \u0301", "none": None}
    assert dist.broadcast_json(value if rank == 0 else "ignored") == value
    shared = dist.is_first_on_filesystem(Path(sys.argv[1]))
    assert shared == (rank == 0)
    own = Path(sys.argv[1]) / str(rank)
    own.mkdir()
    assert dist.is_first_on_filesystem(own)
    assert not list(own.iterdir())
    best = RunOptions(load_best_model_at_end=True)
    for folder, stage, options in ((Path(sys.argv[1]), 2, best), (own, 0, best), (own, 2, RunOptions())):
        require_whole_checkpoints(folder, options, stage)
    if world_size > 1:
        with pytest.raises(UserError, match="load_best_model_at_end needs whole checkpoints"):
            require_whole_checkpoints(own, best, 2)
    dist.destroy()


if __name__ == "__main__":
    main()
