"""The default optimizer and learning-rate schedule, passed to DeepSpeed as client objects: no compiler is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.deepspeed_compat import full_shape
from qa_deepspeed.models.flat_parameters import DECAYED, NOT_DECAYED


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices with weight decay; vectors (norms) and biases of any shape without.

    These are Trainer's groups (`get_decay_parameter_names`). XLNet's `r_w_bias` and T5's relative attention bias are
    matrices. Under ZeRO-3 the shape that counts is the full one, not that of the partition.
    """
    decayed: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if decays(name, parameter) else others).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter, or all tensors of a flat one, have weight decay."""
    short = name.rpartition(".")[2]
    if short in (DECAYED, NOT_DECAYED):
        return short == DECAYED
    return len(full_shape(parameter)) > 1 and "bias" not in name.lower()


def default_optimizer(model: torch.nn.Module, options: RunOptions) -> AdamW:
    """torch's fused AdamW (Loshchilov & Hutter 2019), as fast on a CPU as DeepSpeed's compiled ones."""
    groups = parameter_groups(model, options.weight_decay)
    return AdamW(groups, lr=options.learning_rate, eps=options.adam_epsilon, fused=True)


ELEMENTWISE = {
    "adam",
    "adamw",
    "lion",
    "adagrad",
    "sgd",
    "rmsprop",
    "adadelta",
    "adamax",
    "nadam",
    "radam",
    "asgd",
    "rprop",
}
"""Optimizers of DeepSpeed and torch that update each number by itself, so that the shapes of tensors do not matter."""


def works_elementwise(section: dict[str, Any] | None) -> bool:
    """Whether the optimizer of a config's section is one of `ELEMENTWISE`; the default one is."""
    return section is None or str(section.get("type")).lower() in ELEMENTWISE


def default_schedule(optimizer: Optimizer, options: RunOptions, total_steps: int) -> LRScheduler:
    """Linear warm-up, then the schedule lr_scheduler_type, counted in optimizer steps."""
    schedule: LRScheduler = get_scheduler(options.lr_scheduler_type, optimizer, options.warmup_steps, total_steps)
    return schedule


SAMPLED_RATES = 1000
"""Steps of a run whose learning rates `learning_rates` gives."""


def learning_rates(options: RunOptions, steps: int) -> dict[int, float]:
    """Learning rate by the default schedule, by optimizer step (from 0): of some steps, among them the first, the last
    and the first after the warm-up, where every schedule has its peak."""
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=options.learning_rate)
    schedule = default_schedule(stand_in, options, steps)
    assert isinstance(schedule, LambdaLR), "get_scheduler gives a function of the step"
    (rule,) = schedule.lr_lambdas
    last = steps - 1
    shown = {last * part // SAMPLED_RATES for part in range(SAMPLED_RATES + 1)} | {min(options.warmup_steps, last)}
    return {step: options.learning_rate * rule(step) for step in sorted(shown)}


def rates_in_words(options: RunOptions, steps: int) -> str:
    """The learning rates of a run that has the default schedule."""
    rates = learning_rates(options, steps)
    peak = max(rates, key=lambda step: rates[step])  # of equal rates the first step
    return (
        f"learning rate {rates[0]:.3g} at the first step, {rates[peak]:.3g} at its peak (step {peak + 1:,}), "
        f"{rates[steps - 1]:.3g} at the last"
    )
