"""Loss and search of the span head: the loss of a row, and the best valid spans of a row. All in float32.

Shapes: `[rows, length]` for logits over a padded micro-batch; positions are tokens of the padded row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

NO_SPAN = -math.inf
"""The score of what is no valid span."""


def span_loss(
    start_logits: Tensor, end_logits: Tensor, start: Tensor, end: Tensor, possible: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Mean of the start's and the end's cross-entropy, for each row (Devlin et al. 2019, section 4.2).

    The softmax runs over the positions that an answer can have, as in decoding: the model need not learn to rule out
    question and special tokens, and a row's loss does not depend on the padding of its batch.

    Args:
        start_logits, end_logits: `[rows, length]`, any float type.
        start, end: `[rows]` token positions; the null position for a row without an answer.
        possible: `[rows, length]` bool, true where an answer may start and end (`answer_positions`).
        smoothing: label smoothing, the part of the target that is spread evenly over the possible positions (Szegedy et
            al. 2016).

    Returns:
        `[rows]` float32, not averaged: the mean is over the global batch, of which one rank has a part.
    """
    return marginal_loss(start_logits, end_logits, start.unsqueeze(1), end.unsqueeze(1), possible, smoothing)


def marginal_loss(
    start_logits: Tensor, end_logits: Tensor, starts: Tensor, ends: Tensor, possible: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Half the negative logarithm of the probability of any of a row's gold spans (Clark & Gardner 2018, section 2.3).

    With one gold span per row it equals `span_loss`. Arguments and result as there, except:
        starts, ends: `[rows, golds]`, padded with -1 for rows with fewer gold spans; every row has at least one.
    """
    start_log_p, end_log_p = (_log_probabilities(logits, possible) for logits in (start_logits, end_logits))
    log_p_of_gold = start_log_p.gather(1, starts.clamp(min=0)) + end_log_p.gather(1, ends.clamp(min=0))
    loss = -log_p_of_gold.masked_fill(starts < 0, float("-inf")).logsumexp(dim=1) / 2
    if smoothing == 0.0:
        return loss
    uniform = (start_log_p + end_log_p).masked_fill(~possible, 0).sum(dim=1) / (2 * possible.sum(dim=1))
    return (1 - smoothing) * loss - smoothing * uniform


def distillation_loss(
    start_logits: Tensor,
    end_logits: Tensor,
    soft_start: Tensor,
    soft_end: Tensor,
    possible: Tensor,
    temperature: float,
) -> Tensor:
    """Mean of the start's and the end's cross-entropy against a teacher's softened probabilities, for each row, times
    the square of the temperature, by which the gradient keeps its size (Hinton et al. 2015, section 2).

    Args: logits and `possible` as in `span_loss`.
        soft_start, soft_end: float32 `[rows, length]`, the teacher's probabilities at this temperature; 0 where no
            answer is possible.

    Returns:
        `[rows]` float32.
    """
    start_log_p, end_log_p = (
        _log_probabilities(logits.float() / temperature, possible).masked_fill(~possible, 0)
        for logits in (start_logits, end_logits)
    )
    return -(soft_start * start_log_p + soft_end * end_log_p).sum(dim=1) * (temperature**2 / 2)


def _log_probabilities(logits: Tensor, possible: Tensor) -> Tensor:
    return functional.log_softmax(logits.float().masked_fill(~possible, float("-inf")), dim=1)


def answer_positions(context_begin: Tensor, context_end: Tensor, null_position: Tensor, length: int) -> Tensor:
    """The positions that an answer can have: context tokens [begin, end) and the null position.

    Args:
        context_begin, context_end, null_position: `[rows]`.

    Returns:
        bool `[rows, length]`.
    """
    possible = _context(context_begin, context_end, length)
    return possible.scatter(1, null_position.unsqueeze(1), True)


def answer_logits(
    logits: Tensor, context_begin: Tensor, context_end: Tensor, null_position: Tensor, width: int
) -> Tensor:
    """The logits of each row's `answer_positions`, the null position first, less the greatest of them, which no softmax
    notices.

    Args:
        logits: `[rows, length]`. context_begin, context_end, null_position: `[rows]`.
        width: at least the positions of each row.

    Returns:
        float16 `[rows, width]`, 0 beyond the positions of a row.
    """
    place = torch.arange(-1, width - 1, device=logits.device) + context_begin.unsqueeze(1)
    beyond = place >= context_end.unsqueeze(1)
    place[:, 0] = null_position
    beyond[:, 0] = False
    found = logits.float().gather(1, place.clamp(max=logits.shape[1] - 1)).masked_fill(beyond, -math.inf)
    found = found - found.max(dim=1, keepdim=True).values
    lowest = torch.finfo(torch.float16).min
    return found.clamp(min=lowest).masked_fill(beyond, 0).half()


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
    """The `count` best spans of each row among all valid ones, in two stages.

    First the best end of every start gives the `count` best starts; then only their spans are ranked. Nothing is lost:
    a start that is not among the best has at least `count` starts before it, whose best spans all rank before each of
    its own. Adding a start logit and rounding keeps the order of the end logits, so the best end is that of the highest
    logit.

    Equal scores are ordered by start, then end, so that the choice does not depend on the device or its threads. A span
    whose score is NaN or -inf is not valid; NaN ranks with +inf, so a row of NaN has no span at all.

    Args:
        start_logits, end_logits: `[rows, length]`, any float type.
        first_start, stop_start: `[rows]`; an answer may start at tokens [first, stop) of the row.
        context_end: `[rows]`; an answer ends before this token.
        count: spans to keep for each row.
        max_length: longest span in tokens.

    Returns:
        start, end (int64), start logit, end logit (float32), each `[rows, spans]` with min(count, length *
        min(max_length, length)) spans, best first; start and end are -1 and the logits 0 where a row has fewer valid
        ones.
    """
    length = start_logits.shape[1]
    width = min(max_length, length)
    starts, ends = start_logits.float() + 0.0, end_logits.float()  # -0.0 ties with 0.0, in sums too
    finite = _known_to_be_finite(starts, ends)
    token = torch.arange(length, device=starts.device)
    no_start = (token < first_start.unsqueeze(1)) | (token >= stop_start.unsqueeze(1))
    open_starts = starts.masked_fill(no_start, NO_SPAN)
    context_ends = ends.masked_fill(token >= context_end.unsqueeze(1), NO_SPAN)
    context_ends = functional.pad(context_ends, (0, width - 1), value=NO_SPAN)
    best_end = functional.max_pool1d(context_ends.unsqueeze(1), width, stride=1).squeeze(1)
    best_of_start = open_starts + best_end
    if not finite:  # the sum of -inf and +inf is NaN
        best_of_start.masked_fill_(no_start, NO_SPAN)
    # by position, so that the spans of the second stage are ordered by start, then end
    chosen = _descending_key(best_of_start, finite).topk(min(count, length), dim=1).indices.sort(dim=1).values

    span_end = chosen.unsqueeze(2) + token[:width]  # [rows, starts, width]
    scores = open_starts.gather(1, chosen).unsqueeze(2) + context_ends.gather(1, span_end.flatten(1)).view_as(span_end)
    if not finite:
        invalid = no_start.gather(1, chosen).unsqueeze(2) | (span_end >= context_end.view(-1, 1, 1))
        scores.masked_fill_(invalid, NO_SPAN)
    scores, span_end = scores.flatten(1), span_end.flatten(1)
    order = _descending_key(scores, finite).topk(min(count, scores.shape[1]), dim=1).indices
    missing = ~(scores.gather(1, order) > NO_SPAN)
    start = chosen.gather(1, order.div(width, rounding_mode="floor"))
    end = span_end.gather(1, order).clamp_(max=length - 1)
    start_logit = starts.gather(1, start).masked_fill_(missing, 0)
    end_logit = ends.gather(1, end).masked_fill_(missing, 0)
    return start.masked_fill_(missing, -1), end.masked_fill_(missing, -1), start_logit, end_logit


def _known_to_be_finite(starts: Tensor, ends: Tensor) -> bool:
    """Whether all logits are known to be finite. On a GPU the host does not wait for the answer: they are not."""
    return starts.device.type == "cpu" and math.isfinite(float(starts.sum() + ends.sum()))


def _descending_key(scores: Tensor, finite: bool) -> Tensor:
    """int64 keys `[rows, n]` without ties: ordered by score, equal scores by position (the first is greatest).

    The bits of a float32, read as an integer, have the floats' order for positive numbers; for negative ones the order
    is reversed, so all bits but the sign are flipped. The position is subtracted below them. NaN, whose sign differs
    between devices, ranks with +inf.

    Args:
        scores: without -0.0; with `finite`, without NaN.
    """
    if not finite:
        scores = scores.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    bits = scores.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & (2**31 - 1))
    return torch.add(torch.arange(0, -scores.shape[1], -1, device=scores.device), ordered, alpha=2**32)
