"""Dropout for CPUs: masks of the same distribution as torch's, drawn several times faster.

torch draws a Bernoulli number for every value, about 8 ns each, a sixth of a training step of a small model. Here a
value takes 16 random bits of numpy's SFC64 generator, about 1 ns. The probability is rounded to a multiple of 2^-16 and
kept values are scaled by the rounded one, so that the expectation is exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LEVELS = 1 << 16
_VALUES_AT_ONCE = 1 << 16  # 256 kB in float32, so that values, mask and result fit into the second-level cache


class KeepMasks:
    """The masks of one call of a dropout, seeded from torch's generator: `torch.manual_seed` determines them.

    A forward pass that is recomputed from torch's restored state (gradient checkpointing) draws the same masks.
    """

    def __init__(self, probability: float) -> None:
        self._dropped_levels = round(probability * _LEVELS)
        self._bits = np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_()))
        self.scale = _LEVELS / (_LEVELS - self._dropped_levels)
        """Factor of kept values."""

    def draw(self, *shape: int) -> Tensor:
        """Bytes of this shape, 0 with the probability of dropping, else 1.

        torch converts bytes to other types faster than booleans.
        """
        count = int(np.prod(shape))
        levels = self._bits.random_raw(-(-count // 4)).view(np.int16)[:count]
        keep = levels >= np.int16(self._dropped_levels - _LEVELS // 2)
        return torch.from_numpy(keep.view(np.uint8).reshape(shape))


class _Dropped(torch.autograd.Function):
    """Dropout that keeps one byte per value for the backward pass."""

    @staticmethod
    def forward(context: Any, values: Tensor, probability: float) -> Tensor:
        masks = KeepMasks(probability)
        keep = masks.draw(*values.shape)
        context.save_for_backward(keep)
        context.scale = masks.scale
        return _kept(values, keep, masks.scale)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (keep,) = context.saved_tensors
        return _kept(gradient, keep, context.scale), None


def _kept(values: Tensor, keep: Tensor, scale: float) -> Tensor:
    """`values` x `keep` x `scale`, part by part, so that all three stay in the processor's cache."""
    result = torch.empty(values.shape, dtype=values.dtype)
    parts = [torch.split(each.reshape(-1), _VALUES_AT_ONCE) for each in (result, keep, values)]
    for out, kept, part in zip(*parts, strict=True):
        out.copy_(kept).mul_(part).mul_(scale)
    return result


class CpuDropout(nn.Dropout):
    """`nn.Dropout` with masks from `KeepMasks`."""

    def forward(self, input: Tensor) -> Tensor:
        """In training, `input` with values set to zero with probability `p` and the others scaled up."""
        if not self.training or self.p in (0.0, 1.0) or input.device.type != "cpu":
            return super().forward(input)
        output: Tensor = _Dropped.apply(input, self.p)  # type: ignore[no-untyped-call]
        return output
