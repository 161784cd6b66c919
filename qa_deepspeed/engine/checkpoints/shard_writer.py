"""What writes a checkpoint's shards: at once, or from copies in host memory while training continues.

Ways of the libraries were tried first. DeepSpeed 0.19.8's (`checkpoint.writer.decoupled`) passes the memory of the
training to a second process, not a copy: zeros that were saved and then overwritten by sevens were sevens in the file;
if the disk is full, that process dies, later saves return as if they had succeeded, and the next optimizer step raises,
which ends the run. torch's (`torch.distributed.checkpoint.async_save`) writes files of its own format, which neither
DeepSpeed nor `export` reads.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

SHARE_OF_FREE_MEMORY = 0.5
"""Part of a host's free memory that copies may take: the next step needs the rest."""


def copied(value: Any, memo: dict[tuple[Any, ...], Tensor] | None = None) -> Any:
    """A state dict, or any nesting of dicts, lists and tuples, with copies of its tensors in host memory.

    Tensors that are one tensor stay one: torch.save writes their storage once.
    """
    memo = {} if memo is None else memo
    if isinstance(value, Tensor):
        key = value.data_ptr(), value.dtype, value.shape, value.stride(), value.device
        if key not in memo or value.numel() == 0:
            memo[key] = value.detach().to("cpu", copy=True)
        return memo[key]
    if isinstance(value, dict):
        # the class of an OrderedDict is part of the file
        pairs = [(key, copied(one, memo)) for key, one in value.items()]
        return type(value)(pairs) if type(value) is not dict else dict(pairs)
    if type(value) in (list, tuple):
        return type(value)(copied(one, memo) for one in value)
    return copy.deepcopy(value)


class ShardWriter:
    """DeepSpeed's writer of checkpoint files, which stores the error of a failed write instead of raising it.

    DeepSpeed's save contains barriers: a rank that raised between them would leave the others waiting.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._copies: list[tuple[Any, str]] | None = None
        self.problem: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file; inside `copying`, copy its contents."""
        if self._copies is not None:
            self._copies.append((copied(state_dict), path))
            return
        self._write(state_dict, path)

    @contextlib.contextmanager
    def copying(self) -> Iterator[Callable[[], None]]:
        """Inside, files are copied instead of written; afterwards the value writes them.

        It raises an OSError where a file cannot be written.
        """
        copies: list[tuple[Any, str]] = []

        def write() -> None:
            self.problem = None
            while copies:  # each is freed when it is written
                self._write(*copies.pop())
            if self.problem is not None:
                raise self.problem

        self._copies = copies
        try:
            yield write
        finally:
            self._copies = None

    def _write(self, state_dict: Any, path: str) -> None:
        try:
            self._writer.save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            lines = str(error).splitlines()
            self.problem = error if isinstance(error, OSError) else OSError(f"{lines[0] if lines else error} ({path})")


class BackgroundTask:
    """One piece of work at a time, done by a thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether work is in progress."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        """Begin; the work before has been waited for. It must not raise."""
        assert not self.running, "one piece of work at a time"
        # a process that ends on an error does not wait for it longer than `wait` does
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Return when the work is done, or after these seconds."""
        if self._thread is not None:
            self._thread.join(seconds)
