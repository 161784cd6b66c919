"""One contestant of bench_train, with the times of its steps: `step_clock.py ours|peer|"peer tuned" OUT ARGUMENTS...`.

Both sides are measured alike: every rank notes the time at the end of each optimizer step, after the GPU (if any) has
finished. OUT.RANK gets JSON: `start` (seconds from the start of the process to the end of the first step), `steps`
(seconds of every later step), and `tokens` (real tokens of every step of this rank: of the rows that went into it).
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

STARTED = time.time() - time.process_time()
"""Near the start of the process: imports before this line take processor time."""

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


class StepClock:
    """Times at the end of steps, and the real tokens that went into the model."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._ends: list[float] = []
        self._tokens: list[int] = []
        self._counted = 0

    def count(self, module: torch.nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: count the tokens that are not padding."""
        if module.training:
            self.add(int(inputs["attention_mask"].sum()))

    def add(self, tokens: int) -> None:
        """Count real tokens of the current step."""
        self._counted += tokens

    def end_step(self) -> None:
        """An optimizer step has ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._ends.append(time.time())
        self._tokens.append(self._counted)
        self._counted = 0

    def write(self) -> None:
        """Write what was measured; every rank has its own file."""
        steps = [end - before for before, end in zip(self._ends, self._ends[1:], strict=False)]
        found = {"start": self._ends[0] - STARTED, "steps": steps, "tokens": self._tokens}
        self._out.with_name(f"{self._out.name}.{os.environ.get('RANK', '0')}").write_text(json.dumps(found))


def run_ours(clock: StepClock, arguments: list[str]) -> None:
    """`qa-deepspeed ARGUMENTS` with the clock in the training loop."""
    from qa_deepspeed.cli.main import main
    from qa_deepspeed.training import loop
    from qa_deepspeed.training.reporting import throughput

    add, end_step, fit = throughput.ThroughputMeter.add, throughput.ThroughputMeter.end_step, loop.fit

    def added(meter: throughput.ThroughputMeter, loss: torch.Tensor, lengths: Any, computed: int) -> None:
        add(meter, loss, lengths, computed)
        clock.add(int(lengths.sum()))

    def timed(meter: throughput.ThroughputMeter) -> None:
        end_step(meter)
        clock.end_step()

    def fitted(*arguments: Any) -> int:
        done = fit(*arguments)
        clock.write()
        return done

    throughput.ThroughputMeter.add = added  # type: ignore[method-assign]
    throughput.ThroughputMeter.end_step = timed  # type: ignore[method-assign]
    from qa_deepspeed.training import train

    train.fit = fitted
    main(arguments)


def run_peer(clock: StepClock, arguments: list[str]) -> None:
    """The peer's `main` with the clock as a callback of its Trainer."""
    from transformers import TrainerCallback

    from tests.paths import SHARED

    specification = importlib.util.spec_from_file_location("peer", SHARED / "peers" / "hf_trainer_qa.py")
    assert specification is not None and specification.loader is not None
    peer = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(peer)

    class Timed(TrainerCallback):
        def on_train_begin(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
            model.register_forward_pre_hook(clock.count, with_kwargs=True)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_step()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            clock.write()

    trainer = peer.Trainer
    peer.Trainer = lambda **options: trainer(**options, callbacks=[Timed()])
    sys.argv = [str(specification.origin), *arguments]
    peer.main()


if __name__ == "__main__":
    launcher = [one for one in sys.argv[1:] if one.startswith("--local_rank")]
    who, out, *rest = [one for one in sys.argv[1:] if one not in launcher]
    (run_ours if who == "ours" else run_peer)(StepClock(Path(out)), rest)
