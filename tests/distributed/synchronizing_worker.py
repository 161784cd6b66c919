"""One rank that notes what makes the host wait for the device: `-m ... synchronizing_worker RUNS.json FOLDER`.

As `worker`; FOLDER/NAME.waits.json has for each optimizer step the operators, with the place in the code that called
them.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.training import train
from qa_deepspeed.training.reporting import throughput
from qa_deepspeed.utils import dist

WAITING = {
    "aten::_local_scalar_dense",  # .item(), float(), int(), bool()
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_consecutive",
}
"""Operators whose result the host must have before it continues."""


class Waits(TorchDispatchMode):
    """The waiting operators since the last `end_step`, and those of the steps before."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[str]] = [[]]

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = operator._schema.name
        if name in WAITING:
            calls = [call for call in traceback.extract_stack()[:-1] if "/torch/" not in call.filename]
            self.steps[-1].append(f"{name} {Path(calls[-1].filename).name}:{calls[-1].name}")
        return operator(*args, **kwargs or {})


def main() -> None:
    """Train each run of the file into FOLDER/NAME."""
    runs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    dist.ensure_rank_env()
    fit: Callable[..., int] = train.fit
    end_step = throughput.ThroughputMeter.end_step
    waits = Waits()

    def counted(*arguments: Any) -> int:
        with waits:
            return fit(*arguments)

    def ended(meter: throughput.ThroughputMeter) -> None:
        end_step(meter)
        waits.steps.append([])

    train.fit = counted  # type: ignore[assignment]
    throughput.ThroughputMeter.end_step = ended  # type: ignore[method-assign]
    for name, options in runs.items():
        waits.steps = [[]]
        options = {**options, "output_dir": str(folder / name)}
        train.train(RunOptions(**options, given=frozenset(options)))
        (folder / f"{name}.waits.json").write_text(json.dumps(waits.steps[:-1]))
    dist.destroy()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
