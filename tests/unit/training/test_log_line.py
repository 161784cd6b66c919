"""What a log step records: the epoch as a fraction, in the log line and among the numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qa_deepspeed.training import loop
from qa_deepspeed.training.reporting.callbacks import NO_CALLBACKS

READ = {
    "train/loss": 2.5,
    "speed/questions_per_second": 10.0,
    "speed/tokens_per_second": 2000.0,
    "speed/padding": 0.05,
    "speed/mfu": 0.25,
}


@pytest.mark.parametrize(("step", "epoch", "shown"), [(25, 0.25, "0.25"), (100, 1.0, "1.00"), (142, 1.42, "1.42")])
def test_the_epoch_is_a_fraction(step: int, epoch: float, shown: str) -> None:
    logged: list[tuple[int, dict[str, float], str]] = []
    engine: Any = SimpleNamespace(grad_norm=0.5, precision="fp32")
    meter: Any = SimpleNamespace(read=lambda: dict(READ))
    reporter: Any = SimpleNamespace(log=lambda *values: logged.append(values))
    plan = SimpleNamespace(plan=SimpleNamespace(global_batch_size=8))
    run: Any = SimpleNamespace(steps=200, steps_per_epoch=100, resolved=plan, callbacks=NO_CALLBACKS)
    loop._log(engine, meter, reporter, run, step, 1e-4)
    ((number, values, line),) = logged
    assert (number, values["train/epoch"]) == (step, epoch)
    assert line.startswith(f"step {step}/200  epoch {shown}  loss 2.5000  lr 1.0e-04  grad_norm 0.50  10 questions/s  ")
