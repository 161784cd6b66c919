"""Ends a run whose loss, gradient or weights are infinite or NaN, without a device synchronization in every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from qa_deepspeed.training.reporting.reporter import may_be_lost
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import write_json

SHOWN_IDS = 16
"""Question ids in the error message; the file holds all of them."""

BAD_BATCH_FILE = "bad_batch.json"


class NonfiniteLossGuard:
    """Records on the device the first step with a nonfinite loss or gradient; checked when the run logs and saves.

    A gradient can be infinite while its loss is finite. DeepSpeed then skips the update, or takes it.
    """

    def __init__(self, device: torch.device) -> None:
        self._step = torch.full((), -1, dtype=torch.int64, device=device)
        self._gradient_step = self._step.clone()
        self._loss = torch.zeros((), device=device)
        self._rates: dict[int, float] = {}

    def note(self, step: int, weighted_loss: torch.Tensor, rate: float) -> None:
        """Record a micro-batch of optimizer step `step` (from 0): its part of the mean loss, a scalar, and the rate."""
        first = ~weighted_loss.isfinite() & (self._step < 0)
        self._step.masked_fill_(first, step)
        self._loss = torch.where(first, weighted_loss.float(), self._loss)
        self._rates[step] = rate

    def note_gradient(self, step: int, norm: torch.Tensor | float) -> None:
        """Record the norm of a step's gradient; DeepSpeed writes -1 for one that is not finite."""
        if isinstance(norm, torch.Tensor):
            self._gradient_step.masked_fill_(~(norm.isfinite() & (norm >= 0)) & (self._gradient_step < 0), step)
        elif not 0 <= norm < math.inf:
            self._gradient_step.masked_fill_(self._gradient_step < 0, step)

    def check(self, ids_of: Callable[[int], list[str]], output_dir: Path, weights_norm: torch.Tensor) -> None:
        """Raise if any rank recorded a nonfinite loss or gradient since the last check, or has nonfinite weights.

        Collective. Steps must have been noted since the last check.

        Args:
            ids_of: returns the question ids of a step's global batch.
            output_dir: rank 0 writes all these ids into its bad_batch.json.
            weights_norm: norm of this rank's weights (`Engine.weights_norm`).

        Raises:
            UserError: names step, loss, learning rate and questions.
        """
        mine, what = self._first()
        rates, self._rates = self._rates, {}
        if mine < 0 and not bool(weights_norm.isfinite()):
            mine, what = max(rates), "the weights became infinite or NaN, although the loss was finite,"
        (latest,) = dist.all_reduce_max([-float(mine) if mine >= 0 else float("-inf")])
        if latest == float("-inf"):
            return
        step = int(-latest)
        ids = ids_of(step)
        if dist.is_rank_zero():
            found = {"step": step + 1, "learning_rate": rates[step], "questions": ids}
            with may_be_lost(output_dir / BAD_BATCH_FILE):
                write_json(output_dir / BAD_BATCH_FILE, found)
        shown = ", ".join(ids[:SHOWN_IDS])
        more = f" and {len(ids) - SHOWN_IDS} more, in {BAD_BATCH_FILE}" if len(ids) > SHOWN_IDS else ""
        if mine != step:
            what = "another rank's loss became infinite or NaN"
        raise UserError(
            f"{what} at step {step + 1} (learning rate {rates[step]:.3e}; questions {shown}{more}):"
            " lower --learning_rate or choose another precision; the checkpoints saved before it are intact"
        )

    def _first(self) -> tuple[int, str]:
        """The first step recorded on this rank, -1 for none, and what became nonfinite in it."""
        loss_step, gradient_step = int(self._step), int(self._gradient_step)
        if loss_step >= 0 and (gradient_step < 0 or loss_step <= gradient_step):
            return loss_step, f"the loss became {float(self._loss)}"
        return gradient_step, "the gradient became infinite or NaN, although the loss was finite,"
