"""Which device this rank works on. Decided before deepspeed is imported, which looks for accelerators at import."""

from __future__ import annotations

import ctypes
import os
import platform

import torch

from qa_deepspeed import dist
from qa_deepspeed.cores import share_cores
from qa_deepspeed.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of malloc.h


def choose_device(no_cuda: bool) -> torch.device:
    """This rank's GPU, or the CPU where there is none or `no_cuda` asks for it. Tells DeepSpeed as well.

    Raises:
        UserError: more ranks on this node than GPUs.
    """
    if no_cuda or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        share_cores()
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
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
