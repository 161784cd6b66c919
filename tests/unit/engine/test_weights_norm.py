"""The norm of a rank's weights is of its weights only, not of what stands behind them in its partitions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qa_deepspeed.engine.deepspeed_compat import place_of_partition
from qa_deepspeed.engine.engine import Engine
from qa_deepspeed.utils import dist


def partitioned(numel: int, rank: int, ranks: int) -> torch.nn.Parameter:
    """A parameter of ones as ZeRO-3 partitions it over the ranks; padding, which it leaves as it is, holds NaN."""
    size = -(-numel // ranks)
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_tensor = torch.full((size,), float("nan"))  # type: ignore[attr-defined]
    parameter.ds_numel, parameter.ds_shape = numel, torch.Size([numel])  # type: ignore[attr-defined]
    parameter.ds_tensor[: place_of_partition(parameter, rank)[1]] = 1.0  # type: ignore[attr-defined]
    return parameter


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("numel", [1, 2, 5, 12, 13])
def test_padding_of_partitions_does_not_count(numel: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The squares of all ranks' norms add up to the number of ones."""
    total = 0.0
    for rank in range(ranks):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        module = SimpleNamespace(parameters=lambda rank=rank: [partitioned(numel, rank, ranks)])
        norm = Engine.weights_norm(SimpleNamespace(module=module))  # type: ignore[arg-type]
        assert norm.isfinite()
        total += float(norm) ** 2
    assert total == pytest.approx(numel)


@pytest.mark.parametrize(("numel", "ranks"), [(13, 4), (2, 3), (12, 3)])
def test_places_of_partitions_cover_the_parameter_once(numel: int, ranks: int) -> None:
    places = [place_of_partition(partitioned(numel, rank, ranks), rank) for rank in range(ranks)]
    covered = [element for begin, count in places for element in range(begin, begin + count)]
    assert covered == list(range(numel))
