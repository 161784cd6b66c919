"""The default optimizer and learning-rate schedule, passed to DeepSpeed as client objects: no compiler is needed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.deepspeed_compat import full_numel, full_shape
from qa_deepspeed.models.flat_parameters import DECAYED, NOT_DECAYED, first_tensor
from qa_deepspeed.models.layers import Layers
from qa_deepspeed.utils.errors import UserError


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, learning_rate: float = 0.0, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices with weight decay; vectors (norms) and biases of any shape without.

    These are Trainer's groups (`get_decay_parameter_names`). XLNet's `r_w_bias` and T5's relative attention bias are
    matrices. Under ZeRO-3 the shape that counts is the full one, not that of the partition.

    layer_decay: other than 1, each layer has two groups of its own, with its peak learning rate (`layers.Layers.rate`).
    Those of the head come first, since the rate of the first group is what a run logs.
    """
    layers = Layers.of(model)
    groups: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            place = layers.count if layer_decay == 1 else layers.place(first_tensor(model, name))
            groups.setdefault((place, decays(name, parameter)), []).append(parameter)
    made: list[dict[str, Any]] = []
    for place, decayed in sorted(groups, reverse=True):
        made.append({"params": groups[place, decayed], "weight_decay": weight_decay if decayed else 0.0})
        if layer_decay != 1:
            made[-1]["lr"] = layers.rate(place, learning_rate, layer_decay)
    return made


def groups_of_run(model: torch.nn.Module, options: RunOptions) -> list[dict[str, Any]]:
    """`parameter_groups` with a run's weight decay and learning rates."""
    return parameter_groups(model, options.weight_decay, options.learning_rate, options.layerwise_lr_decay)


def described_groups(model: torch.nn.Module, options: RunOptions) -> list[str]:
    """A line for each place from the head down: its parameters, and their peak learning rate or that they are frozen.

    For a model that is not flat yet.
    """
    layers = Layers.of(model)
    sizes: Counter[tuple[int, bool]] = Counter()
    for name, parameter in model.named_parameters():
        sizes[layers.place(name), parameter.requires_grad] += full_numel(parameter)
    lines = []
    for place, trained in sorted(sizes, reverse=True):
        rate = layers.rate(place, options.learning_rate, options.layerwise_lr_decay)
        how = f"learning rate {rate:.3g}" if trained else "frozen"
        lines.append(f"  {layers.name(place):10}  {sizes[place, trained]:>13,} parameters, {how}")
    return lines


def check_layerwise(options: RunOptions, config: dict[str, Any]) -> None:
    """Raises UserError where a schedule of DeepSpeed's would set one learning rate for all layers."""
    if options.layerwise_lr_decay != 1 and "scheduler" in config:
        raise UserError(
            f"layerwise_lr_decay: the scheduler of {options.deepspeed_config} sets one learning rate for all layers: "
            "take it out of the config, and use --lr_scheduler_type and --warmup_steps"
        )


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter, or all tensors of a flat one, have weight decay."""
    short = name.rpartition(".")[2]
    if short in (DECAYED, NOT_DECAYED):
        return short == DECAYED
    return len(full_shape(parameter)) > 1 and "bias" not in name.lower()


def default_optimizer(model: torch.nn.Module, options: RunOptions) -> AdamW:
    """torch's fused AdamW (Loshchilov & Hutter 2019), as fast on a CPU as DeepSpeed's compiled ones."""
    groups = groups_of_run(model, options)
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
