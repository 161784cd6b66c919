"""Question-answering heads: inputs, loss and best spans of each kind (span, beam)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.qa.decoding.candidates import BestSpans, null_logits
from qa_deepspeed.qa.decoding.spans import (
    answer_positions,
    best_spans,
    distillation_loss,
    marginal_loss,
    span_loss,
)
from qa_deepspeed.qa.features.batching import Batch
from qa_deepspeed.utils.errors import UserError

BEAM_CLASSES = {"xlnet": "XLNetForQuestionAnswering", "xlm": "XLMForQuestionAnswering"}
"""The Transformers class with a beam head, by model type."""


@dataclass(frozen=True)
class Objective:
    """The training objective: `span_loss`, or `marginal_loss` over all gold spans, with label smoothing; with a teacher
    the mean of that and `distillation_loss`, by the teacher's weight."""

    marginal: bool = False
    smoothing: float = 0.0
    teacher_weight: float = 0.0
    temperature: float = 1.0

    @classmethod
    def of(cls, options: RunOptions) -> Objective:
        """That of a training run."""
        marginal = options.objective == "marginal"
        weight = options.distillation_weight if options.teachers else 0.0
        return cls(marginal, options.label_smoothing, weight, options.distillation_temperature if weight else 1.0)


CLASSIC = Objective()


class Head(Protocol):
    """A kind of head; `outputs` are those of the Transformers model."""

    null_score_is_odds: bool
    """Whether the null score is the null odds; else the null odds are the null score minus the best span's score."""

    def training_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The model's arguments in training."""

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """The loss of each row, float32 `[rows]`."""

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The model's arguments in evaluation."""

    def best(self, outputs: Any, batch: Batch, starts: tuple[Tensor, Tensor], count: int, max_length: int) -> BestSpans:
        """The `count` best spans of each row that start at a position [first, stop), `starts`, each `[rows]`."""


def head_of(model: torch.nn.Module, version_2_with_negative: bool, objective: Objective = CLASSIC) -> Head:
    """The kind of head of a Transformers model.

    Raises:
        UserError: an objective for a beam head, whose loss is computed by the model.
    """
    if type(model).__name__ not in BEAM_CLASSES.values():
        return SpanHead(objective)
    if objective != CLASSIC:
        raise UserError(
            "--objective marginal, --label_smoothing and teachers are for span heads: leave them out for a beam head"
        )
    return BeamHead(model, version_2_with_negative)


class SpanHead:
    """A start and an end logit for each token, as nearly all models have."""

    null_score_is_odds = False

    def __init__(self, objective: Objective = CLASSIC):
        self._objective = objective

    def training_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Without labels: `losses` computes the loss."""
        return batch.inputs

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """By the objective. With a teacher the batch has its probabilities."""
        length = outputs.start_logits.shape[1]
        possible = answer_positions(batch.context_begin, batch.context_end, batch.null_position, length)
        logits, objective = (outputs.start_logits, outputs.end_logits), self._objective
        if objective.marginal:
            losses = marginal_loss(*logits, batch.gold_starts, batch.gold_ends, possible, objective.smoothing)
        else:
            losses = span_loss(*logits, batch.start, batch.end, possible, objective.smoothing)
        if not objective.teacher_weight:
            return losses
        assert batch.soft_start is not None and batch.soft_end is not None, "a teacher's probabilities are missing"
        soft = distillation_loss(*logits, batch.soft_start, batch.soft_end, possible, objective.temperature)
        return (1 - objective.teacher_weight) * losses + objective.teacher_weight * soft

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The columns of the batch."""
        return batch.inputs

    def best(self, outputs: Any, batch: Batch, starts: tuple[Tensor, Tensor], count: int, max_length: int) -> BestSpans:
        """As `best_spans`, with both logits of the null position."""
        start_logits, end_logits = outputs.start_logits, outputs.end_logits
        found = best_spans(start_logits, end_logits, *starts, batch.context_end, count, max_length)
        return BestSpans(*found, *null_logits(batch, start_logits, end_logits))


class BeamHead:
    """End logits conditioned on the start, and a separate score for "no answer": the head of XLNet and XLM.

    The model returns the start_n_top best starts and, for each, the end_n_top best ends (probabilities, though they are
    named `..._log_probs`), and whether the question is unanswerable (`cls_logits`). Sources: forward of
    XLNetForQuestionAnswering and XLMSQuADHead in Transformers 5; p_mask as in run_squad.py: 0 for the context and the
    null position.
    """

    null_score_is_odds = True

    def __init__(self, model: torch.nn.Module, version_2_with_negative: bool):
        self._model = model
        self._v2 = version_2_with_negative

    def training_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Columns and labels: the model computes the loss, with the ends that belong to the true start."""
        labels = {"start_positions": batch.start, "end_positions": batch.end}
        if self._v2:
            labels["is_impossible"] = (batch.start == batch.null_position).to(self._dtype())
        return self.inputs(batch) | labels

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """The model's loss, a mean over the rows, repeated for each row, so that sums over rows are right."""
        losses: Tensor = outputs.loss.float().expand(len(batch.start))
        return losses

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Columns, null positions, and a mask of the tokens that cannot be in an answer."""
        length = batch.inputs["input_ids"].shape[1]
        possible = answer_positions(batch.context_begin, batch.context_end, batch.null_position, length)
        return batch.inputs | {"cls_index": batch.null_position, "p_mask": (~possible).to(self._dtype())}

    def _dtype(self) -> torch.dtype:
        return next(self._model.parameters()).dtype  # the model adds these arguments to its hidden states

    def best(self, outputs: Any, batch: Batch, starts: tuple[Tensor, Tensor], count: int, max_length: int) -> BestSpans:
        """As `best_beam_spans`; the score of "no answer" stands for the null answer's start logit, beside 0."""
        found = best_beam_spans(
            outputs.start_top_index,
            outputs.start_top_log_probs,
            outputs.end_top_index,
            outputs.end_top_log_probs,
            starts,
            batch.context_end,
            count,
            max_length,
        )
        null = outputs.cls_logits.float()
        return BestSpans(*found, null, torch.zeros_like(null))


def best_beam_spans(
    start: Tensor,
    start_probability: Tensor,
    end: Tensor,
    end_probability: Tensor,
    starts: tuple[Tensor, Tensor],
    context_end: Tensor,
    count: int,
    max_length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `count` most likely valid spans among a beam head's pairs; equal scores are ordered by start, then end.

    Args:
        start, start_probability: `[rows, start_n_top]`.
        end, end_probability: `[rows, end_n_top * start_n_top]`; the index of the end varies slowest.
        starts, context_end: a span starts in [first, stop) and ends before context_end; each `[rows]`.

    Returns:
        start, end (int64), log p(start), log p(end | start) (float32), each `[rows, kept]` with kept = min(count,
        pairs); start and end are -1 and the scores 0 where a row has fewer valid spans.
    """
    rows, width = start.shape
    end = end.view(rows, -1, width)  # [rows, end_n_top, start_n_top]
    start_score = start_probability.float().log().unsqueeze(1).expand(end.shape)
    end_score = end_probability.float().log().view(end.shape)
    begin = start.unsqueeze(1).expand(end.shape)
    first, stop = (limit.view(-1, 1, 1) for limit in starts)
    valid = (begin >= first) & (begin < stop) & (end < context_end.view(-1, 1, 1))
    valid &= (end >= begin) & (end - begin < max_length)
    score = (start_score + end_score).masked_fill(~valid, float("-inf"))
    begin, end, start_score, end_score, score = (
        column.reshape(rows, -1) for column in (begin, end, start_score, end_score, score)
    )
    order = (begin * (end.max() + 1) + end).argsort(dim=1)  # by position, which the stable sort by score keeps
    order = order.gather(1, score.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :count]
    begin, end, start_score, end_score, score = (
        column.gather(1, order) for column in (begin, end, start_score, end_score, score)
    )
    none = score == float("-inf")
    return (
        begin.masked_fill(none, -1),
        end.masked_fill(none, -1),
        start_score.masked_fill(none, 0),
        end_score.masked_fill(none, 0),
    )
