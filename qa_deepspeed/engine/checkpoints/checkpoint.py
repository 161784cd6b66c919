"""Checkpoints of a run: DeepSpeed's shards and the state of the loop, complete or absent.

All ranks write a checkpoint as `checkpoint-N.partial`; it is renamed to `checkpoint-N` when every file is on the disk
and listed in its manifest. Training continues after a failed save.

Nothing is written in the background. DeepSpeed 0.19.8's way to do that (`checkpoint.writer.decoupled`) passes the
memory of the training to a second process, not a copy: zeros that were saved and then overwritten by sevens were sevens
in the file. The optimizer would have to wait for the files in any case, so that only one forward and backward pass is
gained. If the disk is full, that process dies, later saves return as if they had succeeded, and the next optimizer step
raises, which ends the run. Both were tried with its `python` writer; its `fast` one needs a GPU and libaio.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

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
from qa_deepspeed.engine.checkpoints.shards import Shards, require_shards
from qa_deepspeed.engine.deepspeed_compat import plain_values_only
from qa_deepspeed.engine.engine import Engine
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError


def checkpoint_bytes(parameters: int, trained: int) -> int:
    """Estimated bytes of a checkpoint, all in float32: weights, and of trained ones the optimizer's copy and two
    moments."""
    return 4 * parameters + 12 * trained


class CheckpointWriter:
    """Writes the checkpoints of one run and limits their number. Every rank has one; its methods are collective."""

    def __init__(self, engine: Engine, output_dir: Path, limit: int | None) -> None:
        self._engine = engine
        self._output_dir = output_dir
        self._limit = limit
        self._acting = dist.is_first_on_filesystem(output_dir)
        self._expected_bytes = checkpoint_bytes(engine.parameters, engine.trained_parameters)
        if self._acting:
            remove_leftovers(output_dir)
            engine.write_common_states()

    def save(
        self, state: LoopState, add_files: Callable[[Path], None] = lambda folder: None, keep: Iterable[str] = ()
    ) -> Path | None:
        """Write output_dir/checkpoint-STEP, with the files of `add_files`, which one rank of each disk calls.

        The limit on their number spares the checkpoints named in `keep`, and this one. Returns None after a failure (a
        full or broken disk), which is logged; training continues.
        """
        final = self._output_dir / f"checkpoint-{state.step}"
        partial = final.with_name(final.name + ".partial")
        complete = (
            self._agree(self._prepare, partial)
            and self._agree(self._engine.save_shards, self._output_dir, partial.name)
            and self._agree(self._complete, partial, final, state, add_files)
        )
        if not complete:
            if self._acting:
                shutil.rmtree(partial, ignore_errors=True)
            dist.log0(f"checkpoint-{state.step} was NOT saved; training continues, earlier checkpoints are untouched")
            return None
        dist.log0(f"saved {final}")
        if self._limit is not None and self._acting:
            try:
                for path in remove_old(self._output_dir, self._limit, {final.name, *keep}):
                    dist.log0(f"removed {path}")
            except OSError as error:
                dist.log_rank(f"cannot remove old checkpoints: {error.strerror}; the next save tries again")
        return final

    def _agree(self, act: Callable[..., None], *arguments: Any) -> bool:
        """Do one part of a save on every rank; returns whether it succeeded on all of them.

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
        return dist.all_reduce_sum([problem is not None])[0] == 0

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
            engine.load_shards(checkpoint.parent, checkpoint.name)
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
