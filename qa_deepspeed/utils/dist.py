"""Ranks and the few collectives this project needs.

The only file that names `torch.distributed`. Everything here works with one process and no process group. Rank and
world size are read from the variables that every launcher sets (`deepspeed`, `torchrun`, Slurm scripts); data between
ranks goes over a host-side (gloo) group as plain bytes: nothing is pickled.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_distributed
from tqdm import tqdm

from qa_deepspeed.utils.errors import LostRankError, StorageError, UserError
from qa_deepspeed.utils.files import disk_failure, disk_message
from qa_deepspeed.utils.supported import require_names
from qa_deepspeed.utils.threads import wait_until_threads_are_idle

GATHER_ROWS = 8192
"""Rows of one exchange in `gather_rows`, so that its buffers stay small however many rows there are."""

NAMES = {"torch.distributed.distributed_c10d": "default_pg_timeout default_pg_nccl_timeout _get_default_store"}
"""Private names of torch in use: module -> names in it."""

LOST_RANK_TEXTS = (
    # gloo, and the store of the rendezvous
    "closed by peer",
    "connection reset",
    "connection refused",
    "broken pipe",
    "timed out",
    "timeout",
    "failed to recv, got 0 bytes",
    "failed to send",
    # NCCL and its watchdog
    "connection closed by remote peer",
    "remote process exited",
    "socket error",
    "watchdog",
    "communicator was aborted",
)
"""Parts of the messages, in lower case, by which gloo and NCCL report a rank that has ended or does not answer."""

STORE_SECONDS = 0.05
"""How often a thread looks into the store for the other ranks' outcomes."""

BEAT_SECONDS = 0.5
"""How often rank 0 gives a sign of life in work for which the others wait without a timeout."""

_host_group: Any = None
_timeout_seconds = 0
_stage = "the start"
_run_token: str | None = None
_store: Any = None  # where the ranks meet, between `run_token` and `init`; rank 0's process serves it
_store_broadcasts = 0
"""Number of broadcasts through the store so far; the same on all ranks."""


def rank() -> int:
    """This process's rank among all processes of the run."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's rank among those on its node; also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of processes of the run on this node (torchrun and deepspeed name the variable differently)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def is_rank_zero() -> bool:
    """Whether this is rank 0, which prints, decodes and writes."""
    return rank() == 0


def log0(message: str) -> None:
    """Print one line on rank 0 and flush it."""
    if is_rank_zero():
        _print(message)


def log_rank(message: str) -> None:
    """Print one line on this rank, with the rank's number where there are several."""
    prefix = f"[rank {rank()}] " if world_size() > 1 else ""
    _print(prefix + message)


def _print(line: str) -> None:
    try:
        tqdm.write(line, file=sys.stdout)  # above a progress bar, not into it
        sys.stdout.flush()
    except OSError as error:
        if disk_failure(error) is None:  # a full disk under the log does not end a run
            raise


OPENMPI_NAMES = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}
"""What OpenMPI's mpirun calls the variables of a rank."""


def ensure_rank_env() -> None:
    """Set the variables of torchrun and deepspeed in a process that neither started, so that nothing looks for mpi4py:
    for a run of one rank, or from OpenMPI's variables where mpirun started it.

    Raises:
        UserError: mpirun does not pass on the address of rank 0.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
            raise UserError(
                "mpirun did not say where rank 0 is: pass it -x MASTER_ADDR=HOST -x MASTER_PORT=29500, or "
                "start by LAUNCHER=openmpi launch/multinode.sh, which does"
            )
        os.environ.update({name: os.environ[theirs] for name, theirs in OPENMPI_NAMES.items()})
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def check_supported() -> None:
    """Check that all private names of torch are there.

    Raises:
        UserError: one is missing.
    """
    require_names("torch", {place: names.split() for place, names in NAMES.items()})


def init(device: torch.device, timeout_seconds: int) -> None:
    """Join the process group; returns when all ranks have joined. Called after the features are built, never before."""
    global _host_group, _timeout_seconds, _store
    if torch_distributed.is_initialized():
        return
    _timeout_seconds = timeout_seconds
    atexit.register(wait_until_threads_are_idle)  # at any end: threads of the groups may outlive `destroy`
    timeout = timedelta(seconds=timeout_seconds)
    # ZeRO makes its own groups without a timeout: they take these defaults.
    defaults: Any = torch_distributed.distributed_c10d
    defaults.default_pg_timeout = timeout
    defaults.default_pg_nccl_timeout = timeout
    if device.type == "cuda":
        torch_distributed.init_process_group("nccl", timeout=timeout, device_id=device)
        _host_group = torch_distributed.new_group(backend="gloo", timeout=timeout)
    else:
        torch_distributed.init_process_group("gloo", timeout=timeout)
        _host_group = torch_distributed.group.WORLD
    _store = None  # the group has taken over rank 0's server, which all stores of its port share


def run_token(timeout_seconds: int) -> str:
    """A random text, the same on all ranks of this start of a run, which need not have joined the process group.

    Rank 0 chooses it; the others read it from the store in which the ranks meet.

    Raises:
        LostRankError: a rank did not come within the timeout.
    """
    global _run_token
    if _run_token is None:
        _run_token = secrets.token_hex(8)
        if world_size() > 1:
            with explain_collective_errors("the start of the run"):
                _run_token = _share_by_store(_run_token, timedelta(seconds=timeout_seconds))
    return _run_token


def adopt_run_token(token: str) -> None:
    """Take part in the work of the process that started this one, whose `run_token` this is."""
    global _run_token
    _run_token = token


def _share_by_store(text: str, timeout: timedelta) -> str:
    """Rank 0's text on every rank."""
    global _store
    from torch.distributed.rendezvous import rendezvous

    store = next(rendezvous("env://", timeout=timeout))[0]
    name = f"qa_deepspeed/token/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if is_rank_zero():
        _store = store  # a rank that already joins the process group is connected to it: see `init`
        store.set(name, text)
        # A process that ends here, as a user's mistake ends it, ends the store too: the others have read before.
        store.wait([f"{name}/read_by/{reader}" for reader in range(1, world_size())])
        return text
    text = store.get(name).decode()
    store.set(f"{name}/read_by/{rank()}", "")  # `set` waits for no reply, which rank 0 may not be there to send
    return text


def set_stage(stage: str) -> None:
    """Note what this rank does from here on, for `explain_lost_rank`."""
    global _stage
    _stage = stage


def explain_lost_rank(error: RuntimeError) -> str | None:
    """One line on a collective that failed because another rank has ended or does not answer: this rank, the stage in
    which it waited, the library's message. None for any other error."""
    text = " ".join(str(error).split())
    lost = any(part in text.lower() for part in LOST_RANK_TEXTS)
    if world_size() == 1 or not lost or "CUDA error" in text:  # the last is a timeout of a kernel
        return None
    return (
        f"rank {rank()} waited in {_stage} for a rank that has ended or hangs; the rank that does not print this line "
        f"is the one to look at ({text[:200]})"
    )


def destroy() -> None:
    """Leave the process group when all ranks have arrived here, so that none is ended during its work."""
    global _host_group
    if torch_distributed.is_initialized():
        barrier()
        torch_distributed.destroy_process_group()
        _host_group = None


def _alone() -> bool:
    return world_size() == 1 or not torch_distributed.is_initialized()


@contextlib.contextmanager
def explain_collective_errors(stage: str) -> Iterator[None]:
    """Inside, which is `stage`, a collective that fails for the loss of another rank says so.

    Raises:
        LostRankError: in place of the communication library's error, as `explain_lost_rank`.
    """
    before = _stage
    set_stage(stage)
    try:
        yield
    except RuntimeError as error:
        lost = explain_lost_rank(error)
        if lost is None:
            raise
        raise LostRankError(lost) from None
    finally:
        set_stage(before)


def barrier() -> None:
    """Wait until every rank is here."""
    if not _alone():
        torch_distributed.barrier(group=_host_group)


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """The sum of each value over the ranks, in float64, on every rank."""
    if _alone():
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64)
    torch_distributed.all_reduce(total, group=_host_group)
    return total.tolist()


def all_reduce_max(values: Sequence[float]) -> list[float]:
    """The maximum of each value over the ranks, on every rank."""
    if _alone():
        return [float(value) for value in values]
    greatest = torch.tensor(values, dtype=torch.float64)
    torch_distributed.all_reduce(greatest, torch_distributed.ReduceOp.MAX, group=_host_group)
    return greatest.tolist()


def broadcast_json(value: Any) -> Any:
    """Rank 0's JSON-able value on every rank; the others' argument is ignored."""
    if _alone():
        return value
    payload = json.dumps(value).encode() if is_rank_zero() else b""
    length = torch.tensor([len(payload)])
    torch_distributed.broadcast(length, 0, group=_host_group)
    buffer = torch.zeros(int(length), dtype=torch.uint8)
    if is_rank_zero():
        buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    torch_distributed.broadcast(buffer, 0, group=_host_group)
    return json.loads(buffer.numpy().tobytes())


def run_on_rank_zero(act: Callable[[], Any], no_timeout: bool = False) -> Any:
    """Call `act` on rank 0 and return its result (JSON-able) on every rank. Collective.

    The others wait for it until the timeout; with `no_timeout`, as long as rank 0 works.

    Raises:
        UserError: on every rank, if `act` raises it on rank 0.
        LostRankError: with `no_timeout`, rank 0 gave no sign of life for the timeout.
        StorageError: on every rank, if a disk of rank 0 is full or fails.
    """

    def acted() -> dict[str, Any]:
        try:
            return {"value": act()}
        except Exception as error:
            message = str(error) if isinstance(error, UserError) else disk_message(error)
            if message is None:
                raise
            return {"error": message, "storage": isinstance(error, StorageError) or not isinstance(error, UserError)}

    if no_timeout and not _alone():
        answer = _broadcast_by_store(acted)
    else:
        answer = broadcast_json(acted() if is_rank_zero() else {})
    if "error" in answer:
        raise (StorageError if answer["storage"] else UserError)(answer["error"])
    return answer["value"]


def _broadcast_by_store(make: Callable[[], Any]) -> Any:
    """What `make` returns on rank 0, through the store in which the ranks met: no collective is open that could time
    out. A thread of rank 0 counts in the store while it works, so that the others notice when it is stopped."""
    global _store_broadcasts
    _store_broadcasts += 1
    store, key = torch_distributed.distributed_c10d._get_default_store(), f"qa_deepspeed/{_store_broadcasts}"
    if is_rank_zero():
        done = threading.Event()

        def count() -> None:
            while not done.wait(BEAT_SECONDS):
                store.add(f"{key}/beats", 1)

        beating = threading.Thread(target=count, daemon=True)
        beating.start()
        try:
            store.set(key, json.dumps(make()))
        finally:
            done.set()
            beating.join()
    else:
        beats, changed = -1, time.monotonic()
        while not store.check([key]):
            if (now := store.add(f"{key}/beats", 0)) != beats:
                beats, changed = now, time.monotonic()
            unchanged = time.monotonic() - changed
            if unchanged > _timeout_seconds:
                raise LostRankError(
                    f"rank {rank()} waited in {_stage} for rank 0, which gave no sign of life for {unchanged:.0f} s; "
                    "it is the one to look at"
                )
            time.sleep(BEAT_SECONDS / 2)
    value = json.loads(store.get(key))
    barrier()  # the store may be rank 0's, which must not end before the others have read
    return value


def agree_by_store(name: str, succeeded: bool) -> bool:
    """Whether all ranks succeeded, through the store in which they met: threads of the ranks can call it, while other
    threads take part in collectives. `name` is used once in a run.

    Raises:
        LostRankError: a rank did not come within the timeout.
    """
    if _alone():
        return succeeded
    store, key = torch_distributed.distributed_c10d._get_default_store(), f"qa_deepspeed/agreements/{name}"
    store.add(f"{key}/{'succeeded' if succeeded else 'failed'}", 1)
    began = time.monotonic()
    while not store.add(f"{key}/failed", 0):  # not `wait`, which would keep other threads from the store
        if store.add(f"{key}/succeeded", 0) == world_size():
            return True
        if time.monotonic() - began > _timeout_seconds:
            raise LostRankError(f"rank {rank()} waited for another rank, {name}, for {_timeout_seconds} s")
        time.sleep(STORE_SECONDS)
    return False


class _Works:
    """Handles of several collectives in progress, waited for as one."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def gather_by_broadcasts(
    output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> _Works | None:
    """`torch.distributed.all_gather_into_tensor`, by a broadcast of each rank's part into its place.

    gloo's own copies all data twice, which makes it two to five times slower between the ranks of one host. Over a
    network its ring sends less when there are many ranks.
    """
    parts = output_tensor.view(-1).chunk(torch_distributed.get_world_size(group))
    mine = parts[torch_distributed.get_rank(group)]
    if mine.data_ptr() != input_tensor.data_ptr():
        mine.copy_(input_tensor.view(-1))
    works = _Works(
        [
            torch_distributed.broadcast(part, group=group, group_src=sender, async_op=True)
            for sender, part in enumerate(parts)
        ]
    )
    if async_op:
        return works
    works.wait()
    return None


def gather_rows(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """All ranks' rows of the named arrays `[rows, ...]`, in rank order, on rank 0; None on the other ranks.

    The number of rows may differ between ranks (0 included); names, dtypes and trailing shapes must not. Rows are sent
    as bytes, `GATHER_ROWS` at a time.
    """
    if _alone():
        return dict(arrays)
    rows = len(next(iter(arrays.values())))
    assert all(len(array) == rows for array in arrays.values()), "arrays of one gather have the same rows"
    as_bytes = [np.frombuffer(array.tobytes(), np.uint8).reshape(rows, _row_bytes(array)) for array in arrays.values()]
    records = np.concatenate(as_bytes, axis=1)
    rows_of_rank = _all_gather_counts(rows)
    chunks: list[list[np.ndarray]] = [[] for _ in rows_of_rank]
    for begin in range(0, max(rows_of_rank), GATHER_ROWS):
        height = min(GATHER_ROWS, max(rows_of_rank) - begin)
        mine = np.zeros((height, records.shape[1]), np.uint8)
        part = records[begin : begin + height]
        mine[: len(part)] = part
        received = [torch.empty(mine.shape, dtype=torch.uint8) for _ in rows_of_rank] if is_rank_zero() else None
        torch_distributed.gather(torch.from_numpy(mine), received, 0, group=_host_group)
        for sender, block in enumerate(received or []):
            chunks[sender].append(block.numpy()[: max(0, rows_of_rank[sender] - begin)])
    if not is_rank_zero():
        return None
    gathered = np.concatenate([records[:0], *(block for blocks in chunks for block in blocks)])
    result, column = {}, 0
    for name, array in arrays.items():
        width = _row_bytes(array)
        columns = np.ascontiguousarray(gathered[:, column : column + width])
        result[name] = columns.view(array.dtype).reshape(len(gathered), *array.shape[1:])
        column += width
    return result


def _row_bytes(array: np.ndarray) -> int:
    return int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize


def _all_gather_counts(count: int) -> list[int]:
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    torch_distributed.all_gather(counts, torch.tensor([count]), group=_host_group)
    return [int(value) for value in counts]


def is_first_on_filesystem(folder: Path) -> bool:
    """Whether this rank writes for its filesystem: one rank on a shared disk, one per node on local disks. Collective.

    Rank 0 writes for its own. Nothing is configured: all ranks try to create the same new file in `folder` (which must
    exist), rank 0 before the others know its name; the rank that succeeds is first.
    """
    if _alone():
        return True
    token = secrets.token_hex(8)
    first = is_rank_zero() and _create(folder / f".claim-{token}")
    claim = folder / f".claim-{broadcast_json(token)}"
    first = first or _create(claim)
    barrier()
    if first:
        claim.unlink()
    return first


def _create(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def torchrun(arguments: Sequence[str]) -> int:
    """Run torchrun; returns 0, or the exit status of the rank that failed first, or 128 + the number of the signal that
    ended that rank or torchrun itself.

    Nodes that rejoin after a loss get a new store: by default torch 2.13 gives them the old one, in which they find
    each other's old ports (pytorch/pytorch issue 135712).
    """
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(list(arguments))
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
    except SignalException as error:
        status = -error.sigval.value
    else:
        return 0
    return status if status > 0 else 128 - status
