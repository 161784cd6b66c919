"""Forward passes of an evaluation on all ranks; rank 0 gathers the candidates of every feature.

Rows are keyed by feature id. Micro-batches are cut from the whole set, so that results do not depend on the number of
ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.heads import Head
from qa_deepspeed.qa.decoding.candidates import candidate_columns, real_rows
from qa_deepspeed.qa.decoding.exact import Candidates
from qa_deepspeed.qa.decoding.full_logits import FullLogits
from qa_deepspeed.qa.decoding.max_context import best_window_ranges
from qa_deepspeed.qa.decoding.row_table import RowTable
from qa_deepspeed.qa.features.batching import Batch, Layout, make_batch
from qa_deepspeed.qa.features.sampler import evaluation_batches
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.progress import ProgressBar

BATCHES_PER_EXCHANGE = 64
"""Micro-batches per gather to rank 0; until then their rows stay on the device."""

LOSS = "loss"
"""Name of the metric (mean over rows) and of the column (loss of a row)."""

Forward = Callable[[dict[str, Tensor]], Any]


@dataclass
class GatheredOutputs:
    """The outputs of all features on rank 0, in the order of feature ids, in memory-mapped files."""

    candidates: Candidates
    logits: FullLogits | None
    """All logits, with `gather` "full"."""
    losses: np.ndarray | None
    """Loss of each row, float32 `[features]`; None of a beam head, which computes answers or a loss."""


def gather_evaluation(
    forward: Forward,
    head: Head,
    device: torch.device,
    store: FeatureStore,
    layout: Layout,
    options: RunOptions,
    folder: Path,
) -> GatheredOutputs | None:
    """Run every feature through the model once; returns the outputs on rank 0, None on other ranks. Collective.

    Every rank makes the same number of forward passes and gathers.

    Args:
        forward: the model's forward pass, from inputs `[rows, length]` to its outputs.
        folder: rank 0 keeps the gathered columns in unnamed files of this folder's disk.
    Raises:
        StorageError: that disk has no room for them; on every rank.
    """
    extract = _ColumnExtractor(head, store, options)
    batches = evaluation_batches(store.lengths, options.per_gpu_eval_batch_size, dist.rank(), dist.world_size())
    tables: list[RowTable] = []
    dist.run_on_rank_zero(lambda: tables.append(RowTable(len(store), extract.columns, folder)))
    table = tables[0] if tables else None
    with ProgressBar("evaluating", len(batches), "batch", shown=dist.is_rank_zero()) as bar:
        for arrived in forward_and_gather(forward, head, device, store, layout, batches, extract, bar):
            if table is not None and arrived is not None:
                table.put(arrived["feature_id"], arrived)
    return None if table is None else extract.gathered(table)


def forward_and_gather(
    forward: Forward,
    head: Head,
    device: torch.device,
    store: FeatureStore,
    layout: Layout,
    batches: Sequence[np.ndarray],
    extract: Callable[[Any, Batch], dict[str, Tensor]],
    bar: ProgressBar,
) -> Iterator[dict[str, np.ndarray] | None]:
    """The columns of the rows of all ranks' micro-batches, on rank 0, as they are gathered; None on other ranks.

    Collective: every rank has as many micro-batches, and takes every item.

    Args:
        batches: the rows of this rank's micro-batches.
        extract: from outputs and micro-batch to the columns `[rows, ...]` of its real rows, on the device.
        bar: advances by micro-batches.
    """
    waiting: list[dict[str, Tensor]] = []
    for number, rows in enumerate(batches, 1):
        batch = make_batch(store.take, rows, layout).to(device)
        waiting.append(extract(batch.by_row(forward(head.inputs(batch))), batch))
        bar.advance()
        if number % BATCHES_PER_EXCHANGE == 0 or number == len(batches):
            arrays = {name: torch.cat([one[name] for one in waiting]).cpu().numpy() for name in waiting[0]}
            waiting.clear()
            yield dist.gather_rows(arrays)


class _ColumnExtractor:
    """Extracts from a model's outputs the columns that decoding needs of each row: top-k candidates, or all logits."""

    def __init__(self, head: Head, store: FeatureStore, options: RunOptions) -> None:
        self._head = head
        self._count, self._max_length = options.n_best_size, options.max_answer_length
        self._whole = options.gather == "full"
        self._loss = not head.null_score_is_odds
        self._length = int(store.lengths.max(initial=0))
        self._best_window: tuple[np.ndarray, np.ndarray] | None = None
        if options.best_window_only:
            self._best_window = best_window_ranges(store.example_index, *store.windows(np.arange(len(store))))
        spans = (self._count,)
        self.columns: dict[str, tuple[str, tuple[int, ...]]] = {
            "feature_id": ("i8", ()),
            "start": ("i4", spans),
            "end": ("i4", spans),
            "start_logit": ("f4", spans),
            "end_logit": ("f4", spans),
            "null_start_logit": ("f4", ()),
            "null_end_logit": ("f4", ()),
        }
        if self._whole:
            self.columns |= dict.fromkeys(("start_logits", "end_logits"), ("f4", (self._length,)))
        if self._loss:
            self.columns[LOSS] = ("f4", ())

    def __call__(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """The columns of a micro-batch, on its device, without dummy rows."""
        starts = self._starts(batch)
        found = self._head.best(outputs, batch, starts, self._count, self._max_length)
        kept = candidate_columns(batch, found, self._count)
        real = real_rows(batch)
        if self._loss:
            kept[LOSS] = self._head.losses(outputs, batch)[:real]
        if self._whole:
            kept["start_logits"] = self._whole_rows(outputs.start_logits, batch)[:real]
            kept["end_logits"] = self._whole_rows(outputs.end_logits, batch)[:real]
        return kept

    def _starts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """First and end position of the tokens where an answer may start, in the padded row, each `[rows]`."""
        if self._best_window is None:
            return batch.context_begin, batch.context_end
        first, stop = (
            torch.from_numpy(limit[batch.feature_id]).to(batch.context_begin.device) for limit in self._best_window
        )
        return batch.context_begin + first, batch.context_begin + stop

    def _whole_rows(self, logits: Tensor, batch: Batch) -> Tensor:
        """Logits without padding, `[rows, longest row of the set]`: tokens from position 0, -inf after the last one."""
        length = logits.shape[1]
        token = torch.arange(length, device=logits.device)
        real = batch.length.unsqueeze(1)
        place = (token + batch.shift.unsqueeze(1)).clamp(max=length - 1)
        unpadded = logits.float().gather(1, place).masked_fill(token >= real, float("-inf"))
        return functional.pad(unpadded, (0, self._length - length), value=float("-inf"))

    def gathered(self, table: RowTable) -> GatheredOutputs:
        """The gathered columns of all rows."""
        columns = table.columns()
        whole = {name: columns.pop(name) for name in ("start_logits", "end_logits") if name in columns}
        logits = FullLogits(columns["feature_id"], **whole) if whole else None
        losses = columns.pop(LOSS, None)
        return GatheredOutputs(Candidates(**columns), logits, losses)
