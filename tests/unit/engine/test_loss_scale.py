"""The dynamic loss scale of float16 goes into an engine of another number of ranks or stage."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from qa_deepspeed.engine.checkpoints.loss_scale import STATE, carry_loss_scale, saved_loss_scaler
from qa_deepspeed.engine.deepspeed_compat import read_checkpoint_file


def scaler(first: float, window: int) -> Any:
    """DeepSpeed's own, with this many steps without an overflow before the scale doubles."""
    return DynamicLossScaler(first, window, 1.0, delayed_shift=2, consecutive_hysteresis=False)


def test_a_scale_continues_where_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was not interrupted: the settings stay the new run's, the file is read without pickles."""
    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 1)  # rank 0 logs
    uninterrupted, fresh = scaler(2.0**16, 3), scaler(2.0**16, 3)
    for overflow in (True, True, False, False):
        uninterrupted.update_scale(overflow)
    assert uninterrupted.cur_scale == 2.0**15
    torch.save({"optimizer_state_dict": {"loss_scaler": uninterrupted}}, tmp_path / "shard.pt")
    saved = saved_loss_scaler(read_checkpoint_file(tmp_path / "shard.pt"))
    carry_loss_scale(SimpleNamespace(loss_scaler=fresh), saved)
    for overflow in (False, False, True):
        assert {name: getattr(fresh, name) for name in STATE} == {name: getattr(uninterrupted, name) for name in STATE}
        uninterrupted.update_scale(overflow)
        fresh.update_scale(overflow)
    wider = scaler(2.0**16, 1000)
    carry_loss_scale(SimpleNamespace(loss_scaler=wider), saved)
    assert (wider.cur_scale, wider.scale_window) == (saved.cur_scale, 1000)


def test_a_fixed_scale_stays() -> None:
    """Of a run without float16, or with a scale that its config names; and of a checkpoint of stage 0."""
    fixed, dynamic = LossScaler(128.0), scaler(2.0**16, 3)
    carry_loss_scale(SimpleNamespace(loss_scaler=fixed), dynamic)
    carry_loss_scale(SimpleNamespace(loss_scaler=dynamic), LossScaler(1.0))
    carry_loss_scale(SimpleNamespace(loss_scaler=dynamic), None)
    carry_loss_scale(SimpleNamespace(), dynamic)
    assert (fixed.cur_scale, dynamic.cur_scale) == (128.0, 2.0**16)
