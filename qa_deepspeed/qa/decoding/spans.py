"""The span head's mathematics: the loss of a row, and the best valid spans of a row. All in float32.

Shapes: `[rows, length]` for logits over a padded micro-batch; positions are tokens of the padded row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def span_loss(
    start_logits: Tensor, end_logits: Tensor, start: Tensor, end: Tensor, possible: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Mean of the start's and the end's cross-entropy, for each row (Devlin et al. 2019, section 4.2).

    The softmax runs over the positions that an answer can have, as decoding does: question and special tokens need not
    be learnt to be wrong, and a row's loss does not depend on the padding that its batch brings.

    Args:
        start_logits, end_logits: `[rows, length]`, any float type.
        start, end: `[rows]` token positions; the null position for a row without an answer.
        possible: `[rows, length]` bool, true where an answer may start and end (`answer_positions`).
        smoothing: share of the target that is spread evenly over the possible positions (Szegedy et al. 2016).

    Returns:
        `[rows]` float32, not averaged: the mean is over the global batch, which one rank does not see.
    """
    return marginal_loss(start_logits, end_logits, start.unsqueeze(1), end.unsqueeze(1), possible, smoothing)


def marginal_loss(
    start_logits: Tensor, end_logits: Tensor, starts: Tensor, ends: Tensor, possible: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Half the negative logarithm of the probability of any of a row's gold spans (Clark & Gardner 2018, section 2.3).

    With one gold span it is `span_loss`. Arguments and result as there, but for
        starts, ends: `[rows, golds]`; -1 fills rows that have fewer, none has none.
    """
    start_log_p, end_log_p = (_log_probabilities(logits, possible) for logits in (start_logits, end_logits))
    together = start_log_p.gather(1, starts.clamp(min=0)) + end_log_p.gather(1, ends.clamp(min=0))
    loss = -together.masked_fill(starts < 0, float("-inf")).logsumexp(dim=1) / 2
    if smoothing == 0.0:
        return loss
    everywhere = (start_log_p + end_log_p).masked_fill(~possible, 0).sum(dim=1) / (2 * possible.sum(dim=1))
    return (1 - smoothing) * loss - smoothing * everywhere


def _log_probabilities(logits: Tensor, possible: Tensor) -> Tensor:
    return functional.log_softmax(logits.float().masked_fill(~possible, float("-inf")), dim=1)


def answer_positions(context_begin: Tensor, context_end: Tensor, null_position: Tensor, length: int) -> Tensor:
    """bool `[rows, length]`: the context tokens [begin, end) and the null position, all `[rows]`."""
    possible = _context(context_begin, context_end, length)
    return possible.scatter(1, null_position.unsqueeze(1), True)


def _context(context_begin: Tensor, context_end: Tensor, length: int) -> Tensor:
    token = torch.arange(length, device=context_begin.device)
    return (token >= context_begin.unsqueeze(1)) & (token < context_end.unsqueeze(1))


def best_spans(
    start_logits: Tensor,
    end_logits: Tensor,
    first_start: Tensor,
    stop_start: Tensor,
    context_end: Tensor,
    count: int,
    max_length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `count` best spans of each row, exactly: all starts that are allowed, all ends up to max_length - 1 further.

    Equal scores are ordered by start, then end, so that the choice does not depend on the device or its threads.

    Args:
        start_logits, end_logits: `[rows, length]`.
        first_start, stop_start: `[rows]`; an answer may start at tokens [first, stop) of the row.
        context_end: `[rows]`; it ends before this token.
        count: spans to keep for each row.
        max_length: longest span in tokens.

    Returns:
        start, end (int64), start logit, end logit (float32), each `[rows, kept]` with kept = min(count, length *
        band width), best first; start and end are -1 and the logits 0 where a row has fewer valid spans.
    """
    rows, length = start_logits.shape
    width = min(max_length, length)
    starts = start_logits.float()
    ends = functional.pad(end_logits.float(), (0, width - 1), value=float("-inf"))
    band = starts.unsqueeze(2) + ends.unfold(1, width, 1)  # [rows, length, width]: start s, end s + offset
    token = torch.arange(length, device=starts.device)
    offset = torch.arange(width, device=starts.device)
    inside = _context(first_start, stop_start, length)
    valid = inside.unsqueeze(2) & (token.unsqueeze(1) + offset < context_end.view(-1, 1, 1))
    scores = band.masked_fill(~valid, float("-inf")).view(rows, -1)
    order = _descending_key(scores).topk(min(count, scores.shape[1]), dim=1).indices
    found = scores.gather(1, order) > float("-inf")
    start = order.div(width, rounding_mode="floor")
    end = (start + order % width).clamp(max=length - 1)
    start_logit = starts.gather(1, start).masked_fill(~found, 0)
    end_logit = end_logits.float().gather(1, end).masked_fill(~found, 0)
    return start.masked_fill(~found, -1), end.masked_fill(~found, -1), start_logit, end_logit


def _descending_key(scores: Tensor) -> Tensor:
    """int64 keys `[rows, spans]` without ties: ordered by score, equal scores by position (the first is greatest).

    The bits of a float32, read as an integer, have the floats' order for positive numbers and the reverse of it for
    negative ones; the low 32 bits hold the position.
    """
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0 turns -0.0 into 0.0, which must tie with it
    ordered = torch.where(bits < 0, -(bits + 2**31) - 1, bits)
    position = torch.arange(scores.shape[1], device=scores.device)
    return ordered * 2**32 + (2**32 - 1 - position)
