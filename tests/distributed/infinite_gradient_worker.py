"""One rank that trains several runs, each with an infinite gradient of a finite loss in rank 1's third step.

`-m tests.distributed.infinite_gradient_worker RUNS.json FOLDER`; the error of a run goes into FOLDER/NAME.error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models import heads
from qa_deepspeed.training.train import train
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError

BAD_STEP = 3


class InfiniteGradient(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, losses: torch.Tensor) -> torch.Tensor:
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * float("inf")


def main() -> None:
    """Train each run of the file into FOLDER/NAME."""
    runs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    dist.ensure_rank_env()
    calls = 0
    losses = heads.SpanHead.losses

    def spoiled(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        found = losses(*arguments)
        return InfiniteGradient.apply(found) if calls == BAD_STEP and dist.rank() == 1 else found

    heads.SpanHead.losses = spoiled  # type: ignore[method-assign,assignment]
    for name, options in runs.items():
        calls = 0
        options = {**options, "output_dir": str(folder / name)}
        try:
            train(RunOptions(**options, given=frozenset(options)))
        except UserError as error:
            (folder / f"{name}.error-{dist.rank()}").write_text(str(error))
    dist.destroy()


if __name__ == "__main__":
    main()
