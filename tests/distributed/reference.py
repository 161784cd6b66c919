"""A training loop written without this package: plain Transformers, torch's AdamW, one row at a time, in float64.

Only the rows come from the feature store. Batches, loss, gradient norm, clipping, weight decay and learning rates are
written out here from their definitions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForQuestionAnswering, set_seed

from qa_deepspeed.qa.features.store import FeatureStore


@dataclass(frozen=True)
class Settings:
    """What a run is trained with; `batch` rows make an optimizer step."""

    batch: int
    epochs: int
    seed: int
    warmup_steps: int
    adam_epsilon: float
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    group_by_length: bool


@dataclass
class Trained:
    """Numbers of each optimizer step, and the weights at the end. Norms are taken before clipping."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    before: dict[str, np.ndarray] = field(default_factory=dict)
    """The weights before the first step."""


@dataclass(frozen=True)
class Row:
    """A training row, without padding; an answer starts and ends at one of the `allowed` tokens."""

    input_ids: torch.Tensor
    token_type_ids: torch.Tensor
    allowed: torch.Tensor
    start: int
    end: int


def rows_of(store: FeatureStore) -> list[Row]:
    """All rows of a feature store."""
    rows = []
    for number in range(len(store)):
        found = store.take(np.array([number]))
        types = found.token_type_ids
        assert types is not None, "the reference reads a BERT's rows"
        context = range(int(found.context_begin[0]), int(found.context_end[0]))
        allowed = torch.tensor([int(found.null_position[0]), *context])
        ids, kinds = (torch.tensor(values.astype(np.int64)) for values in (found.input_ids, types))
        rows.append(Row(ids, kinds, allowed, int(found.start[0]), int(found.end[0])))
    return rows


def batches_of_epoch(lengths: np.ndarray, batch: int, seed: int, epoch: int, grouped: bool) -> list[np.ndarray]:
    """Rows of each step: shuffled and cut; if `grouped`, the full batches are cut from rows sorted by length and come
    in random order, the rest last."""
    assert len(lengths) <= 50 * batch, "more rows would be sorted in several parts"
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    if not grouped:
        return [order[begin : begin + batch] for begin in range(0, len(order), batch)]
    full = order[: len(order) - len(order) % batch]
    full = full[np.argsort(-lengths[full], kind="stable")].reshape(-1, batch)
    batches = [full[number] for number in random.permutation(len(full))]
    rest = order[full.size :]
    return [*batches, rest] if len(rest) else batches


def row_loss(model: torch.nn.Module, row: Row) -> torch.Tensor:
    """Mean of the cross-entropies of start and end, over the allowed tokens."""
    outputs = model(input_ids=row.input_ids[None], token_type_ids=row.token_type_ids[None])
    loss = torch.zeros((), dtype=torch.float64)
    for logits, target in ((outputs.start_logits[0], row.start), (outputs.end_logits[0], row.end)):
        place = int((row.allowed == target).nonzero()[0, 0])
        loss = loss - torch.log_softmax(logits[row.allowed], dim=0)[place] / 2
    return loss


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """Of optimizer step `step`, counted from 0: a linear rise from 0, then a linear fall to 0 after the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    return settings.learning_rate * (steps - step) / (steps - settings.warmup_steps)


def decays(name: str) -> bool:
    """Whether a BERT's weight decays: biases and layer norms do not."""
    return not name.endswith(".bias") and "LayerNorm" not in name


def train(
    model_folder: Path, rows: list[Row], settings: Settings, at_epoch: Callable[[int], Settings] | None = None
) -> Trained:
    """Train the model in `model_folder`; `at_epoch` gives the settings of an epoch, where they change on the way."""
    set_seed(settings.seed)
    model = AutoModelForQuestionAnswering.from_pretrained(model_folder, attn_implementation="eager").double().train()
    named = dict(model.named_parameters())
    trained = Trained(before={name: value.detach().numpy().copy() for name, value in named.items()})
    with_decay, without = (
        [value for name, value in named.items() if decays(name) == wanted] for wanted in (True, False)
    )
    optimizer = torch.optim.AdamW(
        [{"params": with_decay}, {"params": without}], betas=(0.9, 0.999), eps=settings.adam_epsilon
    )
    lengths = np.array([len(row.input_ids) for row in rows])
    of_order = (lengths, settings.batch, settings.seed)
    epochs = [batches_of_epoch(*of_order, epoch, settings.group_by_length) for epoch in range(settings.epochs)]
    steps = sum(map(len, epochs))
    for epoch, batches in enumerate(epochs):
        now = at_epoch(epoch) if at_epoch else settings
        for batch in batches:
            rate = learning_rate(now, len(trained.losses), steps)
            for group, decay in zip(optimizer.param_groups, (now.weight_decay, 0.0), strict=True):
                group.update(lr=rate, weight_decay=decay)
            optimizer.zero_grad()
            loss = torch.stack([row_loss(model, rows[number]) for number in batch]).mean()
            loss.backward()
            gradients = [value.grad for value in named.values() if value.grad is not None]
            norm = float(torch.sqrt(sum((gradient**2).sum() for gradient in gradients)))  # type: ignore[arg-type]
            for gradient in gradients:
                gradient *= min(1.0, now.max_grad_norm / norm)
            optimizer.step()
            trained.losses.append(float(loss.detach()))
            trained.norms.append(norm)
            trained.rates.append(rate)
    trained.weights = {name: value.detach().numpy().copy() for name, value in named.items()}
    return trained
