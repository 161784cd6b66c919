"""Dropout for CPUs: the same distribution of masks as torch's, drawn several times faster.

torch draws a Bernoulli number for every value, about 8 ns each, a sixth of a training step of a small model. Here a
value takes 16 random bits of numpy's SFC64 generator, about 1 ns; the probability is rounded to a multiple of 2^-16,
and what is kept is scaled by the rounded one, so that the expectation is exact.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

_LEVELS = 1 << 16


class KeepMasks:
    """The masks of one call of a dropout: seeded from torch's generator, so `torch.manual_seed` decides them.

    A forward pass that is computed again from torch's restored state (gradient checkpointing) draws the same ones.
    """

    def __init__(self, probability: float) -> None:
        self._dropped_levels = round(probability * _LEVELS)
        self._bits = np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_()))
        self.scale = _LEVELS / (_LEVELS - self._dropped_levels)
        """What kept values are multiplied by."""

    def draw(self, *shape: int) -> np.ndarray:
        """A bool array of this shape, false with the probability of being dropped."""
        count = int(np.prod(shape))
        levels = self._bits.random_raw(-(-count // 4)).view(np.int16)[:count]
        return (levels >= np.int16(self._dropped_levels - _LEVELS // 2)).reshape(shape)


class CpuDropout(nn.Dropout):
    """`nn.Dropout` with masks from `KeepMasks`."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` with a share `p` of its values set to zero and the others scaled up, in training."""
        if not self.training or self.p in (0.0, 1.0) or input.device.type != "cpu":
            return super().forward(input)
        masks = KeepMasks(self.p)
        ones = masks.draw(*input.shape).view(np.uint8)  # torch turns booleans into numbers one by one, bytes faster
        return input * torch.from_numpy(ones).to(input.dtype).mul_(masks.scale)
