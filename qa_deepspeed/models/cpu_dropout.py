"""Dropout for CPUs: the same distribution of masks as torch's, drawn several times faster.

torch draws a Bernoulli number for every value, about 8 ns each, a sixth of a training step of a small model. Here a
value takes 16 random bits of numpy's SFC64 generator, about 1 ns; the probability is rounded to a multiple of 2^-16,
and what is kept is scaled by the rounded one, so that the expectation is exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LEVELS = 1 << 16
_VALUES_AT_ONCE = 1 << 16  # 256 kB in float32, so that values, mask and result fit into the second-level cache


class KeepMasks:
    """The masks of one call of a dropout: seeded from torch's generator, so `torch.manual_seed` decides them.

    A forward pass that is computed again from torch's restored state (gradient checkpointing) draws the same ones.
    """

    def __init__(self, probability: float) -> None:
        self._dropped_levels = round(probability * _LEVELS)
        self._bits = np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_()))
        self.scale = _LEVELS / (_LEVELS - self._dropped_levels)
        """What kept values are multiplied by."""

    def draw(self, *shape: int) -> Tensor:
        """Bytes of this shape, 0 with the probability of being dropped, else 1.

        torch turns bytes into other numbers faster than booleans.
        """
        count = int(np.prod(shape))
        levels = self._bits.random_raw(-(-count // 4)).view(np.int16)[:count]
        keep = levels >= np.int16(self._dropped_levels - _LEVELS // 2)
        return torch.from_numpy(keep.view(np.uint8).reshape(shape))


class _Dropped(torch.autograd.Function):
    """Values of which a share is dropped; a byte a value is kept for the backward pass."""

    @staticmethod
    def forward(context: Any, values: Tensor, probability: float) -> Tensor:
        masks = KeepMasks(probability)
        keep = masks.draw(*values.shape)
        context.save_for_backward(keep)
        context.scale = masks.scale
        return _kept(values, keep, masks.scale)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (keep,) = context.saved_tensors
        return _kept(gradient, keep, context.scale), None


def _kept(values: Tensor, keep: Tensor, scale: float) -> Tensor:
    """`values` x `keep` x `scale`, a part at a time, so that all three stay in the processor's cache."""
    answer = torch.empty(values.shape, dtype=values.dtype)
    parts = [each.reshape(-1).split(_VALUES_AT_ONCE) for each in (answer, keep, values)]
    for place, kept, some in zip(*parts, strict=True):
        place.copy_(kept).mul_(some).mul_(scale)
    return answer


class CpuDropout(nn.Dropout):
    """`nn.Dropout` with masks from `KeepMasks`."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` with a share `p` of its values set to zero and the others scaled up, in training."""
        if not self.training or self.p in (0.0, 1.0) or input.device.type != "cpu":
            return super().forward(input)
        return _Dropped.apply(input, self.p)
