"""Numbers derived from the options: micro-batches, accumulation, optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.qa.features.sampler import padded_length
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.units import plural


@dataclass(frozen=True)
class BatchPlan:
    """How the rows of one optimizer step are divided over accumulation steps and ranks."""

    micro_batch_size: int
    """Rows of one forward and backward pass on one rank."""
    gradient_accumulation_steps: int
    world_size: int

    @property
    def global_batch_size(self) -> int:
        """Rows of one optimizer step over all ranks and micro-batches."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    def __str__(self) -> str:
        return (
            f"{self.global_batch_size} rows a step = micro-batches of {self.micro_batch_size} x "
            f"{plural(self.gradient_accumulation_steps, 'accumulation step')} x {plural(self.world_size, 'rank')}"
        )


def plan_batches(rows: int, accumulation: int | None, global_rows: int | None, world_size: int) -> BatchPlan:
    """Derive what is not given: accumulation = global / (rows per GPU x world size).

    Raises:
        UserError: the numbers do not come out; the nearest valid ones are named.
    """
    for name, number in (("rows per GPU", rows), ("accumulation", accumulation), ("global batch size", global_rows)):
        if number is not None and number < 1:
            raise UserError(f"{name} must be at least 1, not {number}")
    if global_rows is None:
        return BatchPlan(rows, accumulation or 1, world_size)
    at_once = rows * world_size
    if accumulation is not None and accumulation * at_once != global_rows:
        raise UserError(
            f"global_batch_size {global_rows} is not {rows} rows per GPU x {accumulation} accumulation steps x "
            f"{world_size} ranks = {accumulation * at_once}; leave one of them out"
        )
    if global_rows % at_once:
        below, above = global_rows // at_once * at_once, math.ceil(global_rows / at_once) * at_once
        choices = f"{below} or {above}" if below else str(above)
        fitting = [n for n in range(1, global_rows + 1) if global_rows % (n * world_size) == 0]
        advice = f" or per_gpu_train_batch_size {min(fitting, key=lambda n: abs(n - rows))}" if fitting else ""
        raise UserError(
            f"global_batch_size {global_rows} does not divide into {rows} rows per GPU x {world_size} ranks; "
            f"take global_batch_size {choices}{advice}"
        )
    return BatchPlan(rows, global_rows // at_once, world_size)


def keep_global_batch_size(plan: BatchPlan, global_rows: int) -> BatchPlan:
    """Cut `global_rows` up for the ranks of `plan`, with micro-batches as large as its own where that comes out.

    Raises:
        UserError: the ranks cannot share them evenly.
    """
    if global_rows % plan.world_size:
        fitting = [ranks for ranks in range(1, global_rows + 1) if global_rows % ranks == 0]
        near = min(fitting, key=lambda ranks: abs(ranks - plan.world_size))
        raise UserError(
            f"this run takes {global_rows} rows in each step, which {plan.world_size} ranks cannot share "
            f"evenly: start {near} ranks, or give --per_gpu_train_batch_size and --resume_with_changes "
            "global_batch_size"
        )
    each = global_rows // plan.world_size
    rows = max(rows for rows in range(1, plan.micro_batch_size + 1) if each % rows == 0)
    return BatchPlan(rows, each // rows, plan.world_size)


def longest_rows_at_once(options: RunOptions, plan: BatchPlan) -> int:
    """Rows of a micro-batch in which all have max_seq_length tokens: the one that needs the most memory."""
    if not options.max_tokens_per_batch:
        return plan.micro_batch_size
    by_tokens = max(1, options.max_tokens_per_batch // padded_length(options.max_seq_length))
    return min(by_tokens, -(-plan.global_batch_size // plan.world_size))


def epoch_steps(rows: int, plan: BatchPlan) -> int:
    """Optimizer steps of an epoch of `rows` training rows; the last may be a partial batch."""
    return math.ceil(rows / plan.global_batch_size)


def total_steps(options: RunOptions, rows: int, plan: BatchPlan) -> int:
    """Optimizer steps of the whole run over epochs of `rows` training rows."""
    if options.max_steps > 0:
        return options.max_steps
    return max(1, math.ceil(options.num_train_epochs * epoch_steps(rows, plan)))
