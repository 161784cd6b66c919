"""Checkpoints of a run: DeepSpeed's shards and the state of the loop, complete or not there.

A checkpoint is written as `checkpoint-N.partial` by all ranks and renamed to `checkpoint-N` when every file is there.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from qa_deepspeed import dist
from qa_deepspeed.engine.engine import Engine
from qa_deepspeed.errors import UserError
from qa_deepspeed.run_folder import LOOP_FILE, LoopState, read_loop_state


def save(engine: Engine, output_dir: Path, state: LoopState) -> Path:
    """Write output_dir/checkpoint-STEP. Collective."""
    final = output_dir / f"checkpoint-{state.step}"
    partial = final.with_name(final.name + ".partial")
    acting = dist.first_on_this_filesystem(output_dir)
    if acting:
        for leftover in (partial, final):
            shutil.rmtree(leftover, ignore_errors=True)
    dist.barrier()
    engine.save_shards(output_dir, partial.name)
    if acting:
        (partial / LOOP_FILE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        os.rename(partial, final)
    dist.barrier()
    return final


def load(engine: Engine, checkpoint: Path, state: LoopState) -> None:
    """Put the engine where the checkpoint left it. Collective.

    Raises:
        UserError: the checkpoint's shards belong to another number of ranks or another ZeRO stage.
    """
    if (state.world_size, state.zero_stage) != (dist.world_size(), engine.zero_stage) and max(
        state.zero_stage, engine.zero_stage
    ) > 0:
        raise UserError(
            f"{checkpoint} was written by {state.world_size} ranks at ZeRO stage {state.zero_stage}, this run has "
            f"{dist.world_size()} at stage {engine.zero_stage}; start it as it was, or pass "
            "--resume_from_checkpoint never with another output_dir"
        )
    with _plain_values_only():
        engine.load_shards(checkpoint.parent, checkpoint.name)


def whole_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's model weights in float32, put together from the shards; no DeepSpeed engine is needed."""
    stage = read_loop_state(checkpoint).zero_stage
    with _plain_values_only():
        if stage == 0:
            states = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)
            return {name: tensor.float() for name, tensor in states["module"].items()}
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)


class _plain_values_only:
    """Inside, torch.load reads tensors, plain values and a few of DeepSpeed's classes, whatever it passes."""

    VARIABLE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"

    def __enter__(self) -> None:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        self._globals = torch.serialization.safe_globals(
            [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
        )
        self._globals.__enter__()
        self._before = os.environ.get(self.VARIABLE)
        os.environ[self.VARIABLE] = "1"

    def __exit__(self, *exception: object) -> None:
        if self._before is None:
            del os.environ[self.VARIABLE]
        else:
            os.environ[self.VARIABLE] = self._before
        self._globals.__exit__(*exception)
