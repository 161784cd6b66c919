"""A checkpoint file that would run a program is not loaded, and the error is one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qa_deepspeed.engine.deepspeed_compat import read_checkpoint_file
from qa_deepspeed.utils.errors import UserError


class Trick:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self._target),)


def test_a_pickle_that_runs_a_program_is_one_line(tmp_path: Path) -> None:
    torch.save({"module": torch.zeros(2), "steps": Trick(tmp_path / "ran")}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match=r"holds \S*mkdir, which no checkpoint of this trainer has") as error:
        read_checkpoint_file(tmp_path / "mp_rank_00_model_states.pt")
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_tensors_and_plain_values_are_read(tmp_path: Path) -> None:
    torch.save({"module": torch.ones(2), "steps": 3}, tmp_path / "file.pt")
    assert read_checkpoint_file(tmp_path / "file.pt")["steps"] == 3
