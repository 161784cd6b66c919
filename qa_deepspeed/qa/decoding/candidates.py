"""Candidates of a micro-batch, selected on its device: the best spans and the null logits of each row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qa_deepspeed.qa.decoding.spans import answer_positions
from qa_deepspeed.qa.features.batching import DUMMY_ROW, Batch


class BestSpans(NamedTuple):
    """The best spans of each row, best first, `[rows, spans]`, and the logits of the null answer, `[rows]`. All scores
    are float32.

    start and end are positions in the padded row, -1 (and the logits 0) where a row has fewer valid spans.
    """

    start: Tensor
    end: Tensor
    start_logit: Tensor
    end_logit: Tensor
    null_start_logit: Tensor
    null_end_logit: Tensor


def candidate_columns(batch: Batch, found: BestSpans, n_best_size: int) -> dict[str, Tensor]:
    """The columns of `exact.Candidates` for the real rows of a micro-batch, on its device; dummy rows are dropped."""
    shift = batch.shift.unsqueeze(1) * (found.start >= 0)
    columns = {
        "feature_id": torch.from_numpy(batch.feature_id).to(found.start.device),
        "start": _fixed_width((found.start - shift).to(torch.int32), n_best_size, -1),
        "end": _fixed_width((found.end - shift).to(torch.int32), n_best_size, -1),
        "start_logit": _fixed_width(found.start_logit, n_best_size, 0),
        "end_logit": _fixed_width(found.end_logit, n_best_size, 0),
        "null_start_logit": found.null_start_logit,
        "null_end_logit": found.null_end_logit,
    }
    real = real_rows(batch)
    return {name: values[:real] for name, values in columns.items()}


def real_rows(batch: Batch) -> int:
    """Number of rows of a micro-batch that are no dummy rows."""
    return int((batch.feature_id != DUMMY_ROW).sum())


def null_logits(batch: Batch, start_logits: Tensor, end_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end logit of the null position, float32 `[rows]` each; their sum is the null score."""
    null = batch.null_position.unsqueeze(1)
    return start_logits.float().gather(1, null).squeeze(1), end_logits.float().gather(1, null).squeeze(1)


def normalizers(batch: Batch, start_logits: Tensor, end_logits: Tensor) -> Tensor:
    """Log of the product of the denominators of the start and the end softmax over all positions that an answer can
    have; float32 `[rows]`.

    exp(start logit + end logit - this) is the product of the span's two probabilities.
    """
    length = start_logits.shape[1]
    possible = answer_positions(batch.context_begin, batch.context_end, batch.null_position, length)
    start, end = (
        logits.float().masked_fill(~possible, float("-inf")).logsumexp(dim=1) for logits in (start_logits, end_logits)
    )
    return start + end


def _fixed_width(values: Tensor, width: int, fill: int) -> Tensor:
    """`[rows, spans]` padded to `[rows, width]`: very short rows and beam heads have fewer spans than n_best_size."""
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)
