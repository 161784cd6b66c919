"""Reads and writes of swap files, in place of DeepSpeed's operator async_io.

That operator (DeepSpeed 0.19.8) does not look at the results of its reads and writes: on a full disk, and where a
tensor does not begin at a multiple of 512 bytes, as gradients of some models do not, training continued with what the
memory held before. It needs libaio, a compiler and locked memory, too.
"""

from __future__ import annotations

import errno
import os
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from qa_deepspeed.utils.errors import StorageError

THREADS = 4
"""Reads and writes at the same time, of one handle."""


class SwapIO:
    """What DeepSpeed's swappers use of an `aio_handle`: reads and writes begin at once, and `wait` ends them.

    Buffers are page-locked where there are GPUs, which copy from them. Settings of the operator are ignored.
    """

    _all: weakref.WeakSet[SwapIO] = weakref.WeakSet()

    def __init__(self, **settings: Any) -> None:
        self._buffers: list[torch.Tensor] = []
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="swap")
        self._begun: list[Future[None]] = []
        SwapIO._all.add(self)

    def async_pread(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        """Begin to fill a tensor from a file. Returns 0, as the operator does."""
        self._begun.append(self._pool.submit(_read, tensor, path, offset))
        return 0

    def async_pwrite(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        """Begin to write a tensor to a file. Returns 0."""
        self._begun.append(self._pool.submit(_write, tensor, path, offset))
        return 0

    def wait(self) -> int:
        """Return when all is read and written that was begun: how many reads and writes.

        Raises:
            StorageError: one failed.
        """
        begun, self._begun = self._begun, []
        for one in begun:
            one.result()
        return len(begun)

    def new_cpu_locked_tensor(self, numel: int, like: torch.Tensor) -> torch.Tensor:
        """A buffer `[numel]` in host memory of the type of `like`."""
        buffer = torch.empty(numel, dtype=like.dtype, pin_memory=torch.cuda.is_available())
        self._buffers.append(buffer)
        return buffer

    def free_cpu_locked_tensor(self, buffer: torch.Tensor) -> bool:
        """Let go of a buffer; whether it was one."""
        kept = [one for one in self._buffers if one.data_ptr() != buffer.data_ptr()]
        freed, self._buffers = len(kept) < len(self._buffers), kept
        return freed

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in a buffer of any handle."""
        begin = tensor.data_ptr()
        return any(
            buffer.data_ptr() <= begin and begin + tensor.nbytes <= buffer.data_ptr() + buffer.nbytes
            for handle in SwapIO._all
            for buffer in handle._buffers
        )


def _read(tensor: torch.Tensor, path: str, offset: int) -> None:
    target = tensor.detach() if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu")
    rest = _bytes_of(target)
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            while rest:
                count = os.preadv(handle, [rest], offset)
                if not count:
                    raise OSError(errno.EIO, "it is shorter than what was written")
                rest, offset = rest[count:], offset + count
        finally:
            os.close(handle)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from None
    if target.device != tensor.device:
        tensor.copy_(target)


def _write(tensor: torch.Tensor, path: str, offset: int) -> None:
    rest = _bytes_of(tensor.detach().cpu())
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            while rest:
                count = os.pwritev(handle, [rest], offset)
                rest, offset = rest[count:], offset + count
        finally:
            os.close(handle)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    return tensor.view(-1).view(torch.uint8).numpy().data
