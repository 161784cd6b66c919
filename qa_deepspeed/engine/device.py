"""Which device this rank works on. Decided before deepspeed is imported, which looks for accelerators at import."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch

from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.units import GIB

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of malloc.h


def choose_device(no_cuda: bool) -> torch.device:
    """This rank's GPU, or the CPU where there is none or `no_cuda` asks for it. Tells DeepSpeed as well.

    Raises:
        UserError: more ranks on this node than GPUs.
    """
    dist.check_supported()
    if no_cuda or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        assign_cores()
        keep_freed_memory()
        return torch.device("cpu")
    if dist.local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"rank {dist.rank()} has no GPU: {dist.local_world_size()} ranks were started here for "
            f"{torch.cuda.device_count()} GPUs; start fewer, or pass --no_cuda"
        )
    if dist.world_size() == 1 and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        dist.log0(f"note: one of {count} GPUs is used; deepspeed --num_gpus {count} --module qa_deepspeed ... uses all")
    device = torch.device("cuda", dist.local_rank())
    torch.cuda.set_device(device)
    # cuDNN's attention plans anew for every length, a tenth of a second each: micro-batches are of many lengths
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def bf16_supported(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16 (every CPU does, if slowly; GPUs since Ampere)."""
    return device.type == "cpu" or torch.cuda.is_bf16_supported()


def keep_freed_memory() -> None:
    """Tell glibc to keep blocks up to 1 GiB for the next step instead of giving them back to the system.

    Activations are freed and asked for again in every step; fetching each page anew is a tenth of a step on long rows.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, GIB)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


THREADS = "OMP_NUM_THREADS"


def assign_cores() -> None:
    """Give this rank its part of the machine's cores, unless the user or a launcher that binds ranks has done so.

    Left alone, ranks that the deepspeed launcher starts have a thread per core of the machine each, and take each
    other's cores: steps become 4 to 40 times slower. torchrun sets one thread a rank, which leaves cores idle.
    """
    if _threads_were_chosen() or not hasattr(os, "sched_getaffinity"):
        return
    mine, bound = os.sched_getaffinity(0), False
    if len(mine) == len(os.sched_getaffinity(os.getppid())):  # with fewer than its launcher, a rank was bound by it
        mine = cores_of(mine, dist.local_rank(), dist.local_world_size())
        bound = len(mine) > 1 and dist.local_world_size() > 1
    torch.set_num_threads(len(mine))
    if bound:  # to a single core it would have no way out when something else runs there
        os.sched_setaffinity(0, mine)
    if dist.local_world_size() > 1:
        dist.log0(
            f"each of {dist.local_world_size()} ranks here computes with {len(mine)} "
            f"{'cores of its own' if bound else 'threads'} ({THREADS} sets another number)"
        )


def cores_of(cores: set[int], rank: int, ranks: int) -> set[int]:
    """The cores of one of `ranks` ranks: as many for each, at least one, neighbours by number."""
    each = max(1, len(cores) // ranks)
    ordered = sorted(cores)
    begin = rank * each % len(ordered)
    return set(ordered[begin : begin + each])


def _threads_were_chosen() -> bool:
    """Whether the user said how many threads; torchrun says 1 for those who said nothing, which is no choice."""
    if THREADS not in os.environ:
        return False
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ[THREADS] != "1":
        return True
    try:  # what torchrun itself was started with
        started = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return any(entry.startswith(f"{THREADS}=".encode()) for entry in started)
