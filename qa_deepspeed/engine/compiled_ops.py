"""DeepSpeed's operators that a config needs compiled: whether they can be compiled here, and the wait for it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from qa_deepspeed.engine import deepspeed_compat as compat
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.home import user_cache
from qa_deepspeed.utils.locks import Holder, file_times

STALE_SECONDS = 600
"""A build's lock older than this counts as left by an interrupted build: the longest build takes a third of it."""

TOUCH_SECONDS = 5.0
"""How often a builder renews the time of its lock, so that those that wait see that it lives."""

POLL_SECONDS = 0.1
"""How often the lock of another build is looked at."""

END_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that end a process at once outside the training loop; SIGINT is an exception already."""

BUILT_OPTIMIZERS = {"adam": "adam", "adamw": "adam", "lion": "lion", "lamb": "lamb", "adagrad": "adagrad"}

WITHOUT = {"quantizer": "take the lines zero_quantized_... out of the config, or --deepspeed_config zero3"}
"""Advice instead of compiling, for operators that do not belong to an optimizer."""


def needed_operators(config: dict[str, Any]) -> list[str]:
    """Names of the operators that DeepSpeed compiles when a run of this config starts."""
    section = config.get("optimizer")
    zero = config.get("zero_optimization", {})
    offload = (zero.get("offload_optimizer") or {}).get("device", "none")
    found = []
    if section is not None and not section.get("params", {}).get("torch_adam"):
        kind = BUILT_OPTIMIZERS.get(str(section.get("type", "")).lower())
        if kind:
            found.append(f"cpu_{kind}" if offload != "none" or kind == "adagrad" else f"fused_{kind}")
    if quantizes_messages(config):
        found.append("quantizer")
    return found


def quantizes_messages(config: dict[str, Any]) -> bool:
    """Whether the config sends 8-bit messages (ZeRO++), by an operator for GPUs that nvcc compiles."""
    zero = config.get("zero_optimization", {})
    return any(zero.get(f"zero_quantized_{what}") for what in ("weights", "gradients", "nontrainable_weights"))


def require(config: dict[str, Any]) -> list[str]:
    """The operators that a run of this config compiles when it starts.

    Raises:
        UserError: one cannot be compiled or loaded.
    """
    operators = needed_operators(config)
    found = faults(operators)
    if found:
        raise UserError("; ".join(found))
    return operators


def faults(operators: list[str]) -> list[str]:
    """Why operators cannot be compiled or loaded, one line each; empty if they can."""
    found = []
    root = extensions_folder()
    for name in operators:
        lock = root / name / "lock"
        age = time.time() - lock.stat().st_mtime if lock.exists() else 0
        if age > STALE_SECONDS:
            found.append(f"{lock} is {age / 60:.0f} minutes old: {_left_behind(lock)}")
        if (root / name / f"{name}.so").exists() or _came_with_deepspeed(name):
            continue
        compiler = "nvcc" if name == "quantizer" else os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            found.append(
                f"the config needs the operator {name} compiled, and there is no {compiler}; install it, or "
                f"{WITHOUT.get(name, 'leave the optimizer section out of the config')}"
            )
        if not _has_ninja():
            found.append(f"the operator {name} is built by ninja, which is not installed; pip install ninja")
    return found


@contextlib.contextmanager
def builds_reported(timeout_seconds: float) -> Iterator[None]:
    """Inside, DeepSpeed says which operator it compiles, and waits for another process's build for a bounded time only.

    Raises:
        UserError: the lock of another build does not go away, or that build failed.
    """
    try:
        with compat.build_locks_by(lambda path: BuildLock(path, timeout_seconds)):
            yield
    except _SignalledInBuild as ended:
        os.kill(os.getpid(), ended.number)  # the handlers are those from before the build again
        raise SystemExit(128 + ended.number) from None
    except RuntimeError as error:
        if isinstance(error.__cause__, UserError):  # DeepSpeed wraps what it does not know
            raise error.__cause__ from None
        raise


class _SignalledInBuild(BaseException):
    """Raised by a signal during a build, so that torch ends the compiler and releases the lock."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class BuildLock:
    """The lock of an operator's build folder, in torch's form: a file that exists while one process builds.

    The builder renews the file's time; a signal ends the build and removes the file. Only a killed builder leaves it.

    Args:
        timeout_seconds: how long nothing may change in the folder while this process waits for another.
    """

    def __init__(self, path: Path, timeout_seconds: float) -> None:
        self._path = path
        self._holder = Holder(path)
        self._patience = min(timeout_seconds, STALE_SECONDS)
        self._released = threading.Event()
        self._handlers: dict[int, Any] = {}

    def try_acquire(self) -> bool:
        """Whether this process has the lock now and builds."""
        try:
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        self._holder.note()
        if not _is_built(self._path.parent):
            dist.log_rank(f"compiling {self._path.parent.name} (takes minutes, once)")
        threading.Thread(target=self._renew, daemon=True).start()
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            before = {number: signal.getsignal(number) for number in END_SIGNALS}
            self._handlers = {number: kept for number, kept in before.items() if kept not in (signal.SIG_IGN, None)}
            for number in self._handlers:
                signal.signal(number, self._end)
        return True

    def wait(self) -> None:
        """Wait until the process that builds releases the lock. The first rank of a node says so.

        Raises:
            UserError: nothing changes in the folder for the timeout, or there is no operator afterwards.
        """
        folder = self._path.parent
        if dist.local_rank() == 0:
            dist.log_rank(f"waiting for {self._path}, another build's lock ({self._holder.read()})")
        seen, changed = file_times(folder), time.monotonic()
        while self._path.exists():
            time.sleep(POLL_SECONDS)
            if (found := file_times(folder)) != seen:
                seen, changed = found, time.monotonic()
            unchanged = time.monotonic() - changed
            if unchanged > self._patience:
                raise UserError(
                    f"{self._path}: no progress for {unchanged:.0f} s (held by {self._holder.read()}); "
                    f"{_left_behind(self._path)}"
                )
        if not _is_built(folder):
            raise UserError(f"{folder}: the other build ended without {folder.name}; start again to build it here")

    def release(self) -> None:
        """Remove the lock; once, since it may be another process's afterwards."""
        if self._released.is_set():
            return
        self._released.set()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        self._holder.clear()
        self._path.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._released.wait(TOUCH_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.release()  # torch releases it too, except between taking it and building
        raise _SignalledInBuild(number)


def _left_behind(lock: Path) -> str:
    return f"a build that was interrupted leaves it, and every run waits for it; if no build is in progress, rm {lock}"


def _is_built(folder: Path) -> bool:
    return any(folder.glob("*.so"))


def _came_with_deepspeed(name: str) -> bool:
    """Whether DeepSpeed was installed with this operator compiled (DS_BUILD_OPS), without importing it."""
    found = importlib.util.find_spec("deepspeed")
    places = found.submodule_search_locations if found is not None else None
    return any(any(Path(place).glob(f"ops/**/{name}_op*.so")) for place in places or ())


def _has_ninja() -> bool:
    beside = Path(sys.executable).parent / "ninja"
    return shutil.which("ninja") is not None or beside.exists()


def extensions_folder() -> Path:
    """The folder of torch's compiled extensions, by the rule of torch.utils.cpp_extension."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named:
        return Path(named)
    cuda = "cpu" if torch.version.cuda is None else "cu" + torch.version.cuda.replace(".", "")
    version = f"py{sys.version_info.major}{sys.version_info.minor}_{cuda}"
    return user_cache() / "torch_extensions" / version
