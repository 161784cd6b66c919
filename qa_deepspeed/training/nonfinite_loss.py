"""Ends a run whose loss is infinite or NaN, without a device synchronization in every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import write_json

SHOWN_IDS = 16
"""Question ids in the error message; the file holds all of them."""

BAD_BATCH_FILE = "bad_batch.json"


class NonfiniteLossGuard:
    """Records on the device the first step with an infinite or NaN loss; checked when the run logs and saves."""

    def __init__(self, device: torch.device) -> None:
        self._step = torch.full((), -1, dtype=torch.int64, device=device)
        self._loss = torch.zeros((), device=device)
        self._rates: dict[int, float] = {}

    def note(self, step: int, weighted_loss: torch.Tensor, rate: float) -> None:
        """Record a micro-batch of optimizer step `step` (from 0): its part of the mean loss, a scalar, and the rate."""
        first = ~weighted_loss.isfinite() & (self._step < 0)
        self._step.masked_fill_(first, step)
        self._loss = torch.where(first, weighted_loss.float(), self._loss)
        self._rates[step] = rate

    def check(self, ids_of: Callable[[int], list[str]], output_dir: Path) -> None:
        """Raise if any rank recorded a nonfinite loss since the last check. Collective.

        Args:
            ids_of: returns the question ids of a step's global batch.
            output_dir: rank 0 writes all these ids into its bad_batch.json.

        Raises:
            UserError: names step, loss, learning rate and questions.
        """
        mine = int(self._step)
        rates, self._rates = self._rates, {}
        (latest,) = dist.all_reduce_max([-float(mine) if mine >= 0 else float("-inf")])
        if latest == float("-inf"):
            return
        step = int(-latest)
        ids = ids_of(step)
        if dist.is_rank_zero():
            write_json(output_dir / BAD_BATCH_FILE, {"step": step + 1, "learning_rate": rates[step], "questions": ids})
        shown = ", ".join(ids[:SHOWN_IDS])
        more = f" and {len(ids) - SHOWN_IDS} more, in {BAD_BATCH_FILE}" if len(ids) > SHOWN_IDS else ""
        loss = f"the loss became {float(self._loss)}" if mine == step else "another rank's loss became infinite or NaN"
        raise UserError(
            f"{loss} at step {step + 1} (learning rate {rates[step]:.3e}; questions {shown}{more}):"
            " lower --learning_rate or choose another precision; the checkpoints saved before it are intact"
        )
