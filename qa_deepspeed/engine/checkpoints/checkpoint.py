"""Checkpoints of a run: DeepSpeed's shards and the state of the loop, complete or absent.

All ranks write a checkpoint as `checkpoint-N.partial`; it is renamed to `checkpoint-N` when every file is on the disk
and listed in its manifest. Training continues after a failed save. It also continues while files are written, from
copies in host memory, where there is room for these.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from qa_deepspeed.config.option_groups import AUTO
from qa_deepspeed.engine.checkpoints.checkpoint_files import (
    LoopState,
    flush_folder,
    read_loop_state,
    remove,
    remove_leftovers,
    remove_old,
    total_bytes,
    verify_checkpoint,
    write_loop_state,
    write_manifest,
)
from qa_deepspeed.engine.checkpoints.shard_writer import SHARE_OF_FREE_MEMORY, BackgroundTask
from qa_deepspeed.engine.checkpoints.shards import Shards, require_shards
from qa_deepspeed.engine.deepspeed_compat import plain_values_only
from qa_deepspeed.engine.engine import Engine
from qa_deepspeed.engine.memory import free_host_memory
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import LostRankError, UserError
from qa_deepspeed.utils.units import gib

POLL_SECONDS = 0.02
"""How often the ranks ask each other whether all files are written."""

SECONDS_AFTER_AN_ERROR = 30.0
"""How long a run that ends on an error waits for a checkpoint that is being written."""


def checkpoint_bytes(parameters: int, trained: int) -> int:
    """Estimated bytes of a checkpoint, all in float32: weights, and of trained ones the optimizer's copy and two
    moments."""
    return 4 * parameters + 12 * trained


class CheckpointWriter:
    """Writes the checkpoints of one run and limits their number. Every rank has one; its methods are collective.

    A context: where it ends with a user's error, what is being written has some seconds to end.
    """

    def __init__(self, engine: Engine, output_dir: Path, limit: int | None, background: str = "false") -> None:
        """
        Args:
            limit: checkpoints to keep; None for all.
            background: `option_groups.AUTO`: a thread writes the files where copies of them fit into host memory;
                "true": always; "false": never.
        """
        self._engine = engine
        self._background = background
        self._task = BackgroundTask()
        self._memory_named = False
        self.completed: list[Path] = []
        """Checkpoints that are complete, in their order; the caller removes what it has seen."""
        self._saves = 0
        self._token = dist.broadcast_json(secrets.token_hex(4))  # of this writer, as a process may have several
        self._output_dir = output_dir
        self._limit = limit
        self._acting = dist.is_first_on_filesystem(output_dir)
        self._expected_bytes = checkpoint_bytes(engine.parameters, engine.trained_parameters)
        if self._acting:
            remove_leftovers(output_dir)
            engine.write_common_states()

    def save(
        self,
        state: LoopState,
        add_files: Callable[[Path], None] = lambda folder: None,
        keep: Iterable[str] = (),
        at_once: bool = False,
    ) -> Path | None:
        """Write output_dir/checkpoint-STEP, with the files of `add_files`, which one rank of each disk calls.

        The limit on their number spares the checkpoints named in `keep`, and this one. Returns None after a failure (a
        full or broken disk), which is logged; training continues. In the background, it returns None too when the files
        are copied: `wait` returns when they are written, as does the next save before it begins.

        Args:
            at_once: write before returning, whatever the settings.
        """
        self.wait()
        final = self._output_dir / f"checkpoint-{state.step}"
        partial = final.with_name(final.name + ".partial")
        prepared = self._agree(self._prepare, partial)
        if prepared and not at_once and self._copies_fit():
            self._save_in_background(partial, final, state, add_files, keep)
            return None
        complete = (
            prepared
            and self._agree(self._engine.save_shards, self._output_dir, partial.name)
            and self._agree(self._complete, partial, final, state, add_files)
        )
        if complete:
            return self._saved(final, keep)
        self._failed(partial)
        return None

    def wait(self) -> None:
        """Return when nothing is written in the background any more, on any rank."""
        if self._background == "false":
            return
        while dist.all_reduce_max([self._task.running])[0]:  # a rank that is lost meanwhile ends this collective
            time.sleep(POLL_SECONDS)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Without another rank nothing is completed, so that a lost one is no reason to wait."""
        if isinstance(error, UserError) and not isinstance(error, LostRankError):
            self._task.wait(SECONDS_AFTER_AN_ERROR)

    def _save_in_background(
        self,
        partial: Path,
        final: Path,
        state: LoopState,
        add_files: Callable[[Path], None],
        keep: Iterable[str],
    ) -> None:
        """Copy the files, and let a thread write them. Its ranks agree through the store in which they met."""
        copied: list[Callable[[], None]] = []
        if not self._agree(lambda: copied.append(self._engine.copy_shards(self._output_dir, partial.name))):
            self._failed(partial)
            return
        self._saves += 1
        number = self._saves

        def write() -> None:
            parts = (copied.pop(), lambda: self._complete(partial, final, state, add_files))
            for part, act in enumerate(parts):
                try:
                    agreed = dist.agree_by_store(f"{self._token}/{number}/{part}", self._succeeds(act))
                except (LostRankError, RuntimeError) as error:  # the main thread meets it in its next collective
                    dist.log_rank(f"{final.name}: {' '.join(str(error).split())[:300]}")
                    agreed = False
                if not agreed:
                    self._failed(partial)
                    return
            self._saved(final, keep)

        self._task.start(write)

    def _copies_fit(self) -> bool:
        """Whether files are written in the background: copies fit into the free memory of every host."""
        if self._background != AUTO:
            return self._background == "true"
        here = self._expected_bytes * (dist.local_world_size() / dist.world_size() if self._engine.zero_stage else 1)
        fit = dist.all_reduce_sum([here > SHARE_OF_FREE_MEMORY * free_host_memory()])[0] == 0
        if not fit and not self._memory_named:
            self._memory_named = True
            dist.log0(f"training waits for each checkpoint: no host memory for copies of {gib(int(here))} GiB")
        return fit

    def _failed(self, partial: Path) -> None:
        if self._acting:
            shutil.rmtree(partial, ignore_errors=True)
        name = partial.name.removesuffix(".partial")
        dist.log0(f"{name} was NOT saved; training continues, earlier checkpoints are untouched")

    def _saved(self, final: Path, keep: Iterable[str]) -> Path:
        dist.log0(f"saved {final}")
        self.completed.append(final)
        if self._limit is not None and self._acting:
            try:
                for path in remove_old(self._output_dir, self._limit, {final.name, *keep}):
                    dist.log0(f"removed {path}")
            except OSError as error:
                dist.log_rank(f"cannot remove old checkpoints: {error.strerror}; the next save tries again")
        return final

    def _agree(self, act: Callable[..., None], *arguments: Any) -> bool:
        """Do one part of a save on every rank; returns whether it succeeded on all of them."""
        return dist.all_reduce_sum([not self._succeeds(act, *arguments)])[0] == 0

    def _succeeds(self, act: Callable[..., None], *arguments: Any) -> bool:
        """Do one part of a save on this rank; returns whether it succeeded.

        Each library raises another class for a full disk (tokenizers a plain Exception), and a rank that raised here
        would leave the others waiting: any error is logged, and the ranks agree on the outcome.
        """
        problem = None
        try:
            act(*arguments)
        except OSError as error:
            problem = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        except Exception as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if problem:
            dist.log_rank(f"cannot save a checkpoint: {problem}")
        return problem is None

    def _prepare(self, partial: Path) -> None:
        if not self._acting:
            return
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        free = shutil.disk_usage(partial).free
        if free < self._expected_bytes:
            raise OSError(
                f"{free / 1e9:.2f} GB free at {self._output_dir}, about {self._expected_bytes / 1e9:.2f} GB are needed"
            )

    def _complete(self, partial: Path, final: Path, state: LoopState, add_files: Callable[[Path], None]) -> None:
        if not self._acting:
            return
        add_files(partial)
        write_loop_state(partial, state)
        write_manifest(partial)
        self._expected_bytes = total_bytes(partial)
        if final.exists():  # damaged, or of earlier settings
            remove(final)
        os.rename(partial, final)
        flush_folder(self._output_dir)


def load(engine: Engine, checkpoint: Path, state: LoopState) -> None:
    """Load a checkpoint into the engine, of any world size, ZeRO stage and precision. Collective.

    Raises:
        UserError: it cannot be converted, or files are missing.
    """
    ours = (dist.world_size(), engine.zero_stage, engine.precision)
    theirs = (state.world_size, state.zero_stage, state.precision)
    same_order = state.optimized == engine.optimized_names  # of the optimizer's groups
    same_order = same_order and state.flat == engine.flat_names
    same_layout = same_order and (ours == theirs or (ours[1:] == theirs[1:] and engine.zero_stage == 0))
    _require_shards_everywhere(checkpoint, state, [dist.rank()] if same_layout else range(state.world_size))
    if same_layout:
        with plain_values_only():
            if engine.load_shards(checkpoint.parent, checkpoint.name):
                return
    if ours != theirs:
        words = "{} ranks at ZeRO stage {} in {}"
        dist.log0(f"converting {checkpoint} from {words.format(*theirs)} to {words.format(*ours)}")
    engine.load_resharded(_shards(checkpoint, state))


def _require_shards_everywhere(checkpoint: Path, state: LoopState, ranks: Iterable[int]) -> None:
    """`require_shards` on every rank; if it raises on one, all ranks raise. Collective."""
    problem = None
    try:
        require_shards(checkpoint, state.zero_stage, ranks)
    except UserError as error:
        problem = error
    if dist.all_reduce_sum([problem is not None])[0]:
        raise problem or UserError(f"shards of {checkpoint} are missing on other nodes, see their messages")


def full_weights(checkpoint: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The full model weights of a checkpoint, assembled from the shards; no DeepSpeed engine is needed.

    Raises:
        UserError: the checkpoint is damaged, or parts of it are not on this disk.
    """
    problem = verify_checkpoint(checkpoint)
    if problem:
        raise UserError(f"{checkpoint} is damaged: {problem}")
    return _shards(checkpoint, read_loop_state(checkpoint)).weights(dtype)


def _shards(checkpoint: Path, state: LoopState) -> Shards:
    return Shards(checkpoint, state.zero_stage, state.world_size, state.optimized, state.flat)
