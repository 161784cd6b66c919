"""The device and the CPU affinity of this rank, set before deepspeed is imported, which then looks for accelerators."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch

from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.units import GIB, plural

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of malloc.h


def choose_device(no_cuda: bool) -> torch.device:
    """This rank's GPU, or the CPU without one or with `no_cuda`. Sets DeepSpeed's accelerator accordingly.

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
    # cuDNN's attention makes a plan for every new length, a tenth of a second each; micro-batches have many lengths
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def bf16_supported(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16 (every CPU does, if slowly; GPUs since Ampere)."""
    return device.type == "cpu" or torch.cuda.is_bf16_supported()


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks of up to 1 GiB for the next step instead of returning them to the system.

    Activations are freed and allocated again in every step; page faults take a tenth of a step on long rows.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, GIB)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


THREADS = "OMP_NUM_THREADS"


def assign_cores() -> None:
    """Set threads and CPU affinity of this rank, unless the user or the launcher has set them.

    By default each rank of the deepspeed launcher has one thread per core of the machine, and the ranks compete for
    cores: steps become 4 to 40 times slower. torchrun sets one thread per rank, which leaves cores idle.
    """
    if _threads_were_chosen() or not hasattr(os, "sched_getaffinity"):
        return
    mine, bound = os.sched_getaffinity(0), False
    if len(mine) == len(os.sched_getaffinity(os.getppid())):  # with fewer, the rank is bound
        mine = cores_of(mine, dist.local_rank(), dist.local_world_size())
        bound = len(mine) > 1 and dist.local_world_size() > 1
    torch.set_num_threads(len(mine))
    if bound:  # a rank on a single core could not evade other processes
        os.sched_setaffinity(0, mine)
    if dist.local_world_size() > 1:
        means = f"{len(mine)} cores of its own" if bound else plural(len(mine), "thread")
        dist.log0(f"each of {dist.local_world_size()} ranks here computes with {means} ({THREADS} sets another number)")


def cores_of(cores: set[int], rank: int, ranks: int) -> set[int]:
    """The cores of one of `ranks` ranks: the same number for each, at least one, adjacent."""
    each = max(1, len(cores) // ranks)
    ordered = sorted(cores)
    begin = rank * each % len(ordered)
    return set(ordered[begin : begin + each])


def _threads_were_chosen() -> bool:
    """Whether the user set the number of threads; torchrun sets 1 if the user did not."""
    if THREADS not in os.environ:
        return False
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ[THREADS] != "1":
        return True
    try:  # torchrun's own environment
        started = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return any(entry.startswith(f"{THREADS}=".encode()) for entry in started)


def device_for_check(no_cuda: bool) -> tuple[str, bool]:
    """Type of the device of a run that would start here, and whether it computes in bfloat16; none is initialized."""
    if not no_cuda and torch.cuda.is_available():
        return "cuda", torch.cuda.is_bf16_supported()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed chooses its accelerator when it is imported
    return "cpu", True
