"""On the device: from a micro-batch's logits to the best spans and the null score of each of its rows."""

from __future__ import annotations

import numpy as np
import torch

from qa_deepspeed.models.heads import best_spans
from qa_deepspeed.qa.batching import Batch


def reduce_to_candidates(
    batch: Batch, start_logits: torch.Tensor, end_logits: torch.Tensor, n_best_size: int, max_answer_length: int
) -> dict[str, np.ndarray]:
    """The columns of `decode.Candidates` for the real rows of a micro-batch; filler is dropped.

    Args:
        start_logits, end_logits: `[rows, length]`, any float type.
        n_best_size: spans to keep of each row.
        max_answer_length: longest span in tokens.
    """
    start, end, start_logit, end_logit = best_spans(
        start_logits, end_logits, batch.context_begin, batch.context_end, n_best_size, max_answer_length
    )
    shift = batch.shift.unsqueeze(1) * (start >= 0)
    real = batch.feature_id >= 0
    return {
        "feature_id": batch.feature_id[real],
        "start": _fixed_width((start - shift).to(torch.int32), n_best_size, -1)[real],
        "end": _fixed_width((end - shift).to(torch.int32), n_best_size, -1)[real],
        "start_logit": _fixed_width(start_logit, n_best_size, 0)[real],
        "end_logit": _fixed_width(end_logit, n_best_size, 0)[real],
        "null_score": null_scores(batch, start_logits, end_logits).cpu().numpy()[real],
    }


def null_scores(batch: Batch, start_logits: torch.Tensor, end_logits: torch.Tensor) -> torch.Tensor:
    """Start plus end logit of the null position, float32 `[rows]`."""
    null = batch.null_position.unsqueeze(1)
    return (start_logits.float().gather(1, null) + end_logits.float().gather(1, null)).squeeze(1)


def _fixed_width(values: torch.Tensor, width: int, fill: int) -> np.ndarray:
    """`[rows, kept]` as `[rows, width]`: very short rows have fewer spans than n_best_size."""
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill).cpu().numpy()
