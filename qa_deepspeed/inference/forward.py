"""Forward passes of an answerer: its device and dtype, batches of windows, threads, and the candidates of windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from qa_deepspeed.models.heads import head_of
from qa_deepspeed.qa.decoding.candidates import candidate_columns, normalizers
from qa_deepspeed.qa.decoding.exact import Candidates
from qa_deepspeed.qa.features.batching import Batch, Layout, make_batch
from qa_deepspeed.qa.features.in_memory import AnswerStore
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.progress import ProgressBar

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1_536, 49_152
"""Tokens per forward pass where no batch_size is given; larger batches speed up GPUs, but not CPUs."""

MAX_PARALLEL_BATCHES = 8
"""Batches in progress at the same time on CPUs: with more, Python's interpreter lock limits the speed."""


def chosen_device(device: torch.device | str | int | None) -> torch.device:
    """The device of this name or number (-1: the CPU); None for a GPU if there is one.

    Raises:
        UserError: there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, int):
        return torch.device("cpu" if device < 0 else f"cuda:{device}")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type == "meta":
        raise UserError(f"there is no device '{device}'; pass cpu, cuda or cuda:0")
    return found


def chosen_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype of this name; float32 for None, as in a config without a dtype.

    Raises:
        UserError: there is no such dtype, or it is one of whole numbers.
    """
    kind = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UserError(f"there is no dtype '{dtype}'; pass float32, bfloat16 or float16")
    return kind


def changes_in_forward(model: torch.nn.Module) -> bool:
    """Whether a forward pass changes the model: some rotary embeddings adapt their frequencies to the row length."""
    kinds = (str(getattr(module, "rope_type", "")) for module in model.modules())
    return any("dynamic" in kind or "longrope" in kind for kind in kinds)


def batches_of(lengths: np.ndarray, rows: int | None, device: torch.device) -> Iterator[np.ndarray]:
    """Batches of windows of similar length, longest first: `rows` windows each, or by tokens for the device."""
    order = np.argsort(-lengths, kind="stable")
    tokens = CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
    begin = 0
    while begin < len(order):
        size = rows or max(1, tokens // int(lengths[order[begin]]))
        yield order[begin : begin + size]
        begin += size


def on_all_cores(work: Callable[[Any], Any], parts: Sequence[Any]) -> Iterator[Any]:
    """Yield `work(part)` of each part, in order; threads work on several parts at once, one per core.

    They are as many as torch has threads, at most `MAX_PARALLEL_BATCHES`. A core that runs a whole forward pass waits
    for no other core; cores that split every operation of one pass do.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(parts), MAX_PARALLEL_BATCHES)
    if workers < 2:
        yield from map(work, parts)
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        yield from pool.map(work, parts)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # new threads inherit the number that was set last


class WindowForward:
    """The forward passes of a model over windows, and their candidate spans.

    Attributes:
        head: the kind of head of the model.
    """

    def __init__(
        self, model: torch.nn.Module, layout: Layout, device: torch.device, batch_size: int | None, *, parallel: bool
    ) -> None:
        """parallel: whether threads may run several batches at once on a CPU; not if the model has its own threads."""
        self.head = head_of(model, version_2_with_negative=True)
        self._model = model
        self._layout = layout
        self._device = device
        self._batch_size = batch_size
        self._parallel = parallel and device.type == "cpu"

    def batch(self, store: AnswerStore, rows: np.ndarray) -> Batch:
        """These windows, padded to one length, on the device."""
        return make_batch(store.take, rows, self._layout).to(self._device)

    def candidates(
        self, store: AnswerStore, count: int, max_answer_len: int, rows: int | None, progress: bool | None
    ) -> tuple[Candidates, np.ndarray]:
        """The top `count` spans of every window, and the normalizers for `decode_like_pipeline`, `[features]`.

        Args: rows: windows of a forward pass.
        """
        parts: list[dict[str, np.ndarray]] = [_no_candidates(count)]
        batches = list(batches_of(store.lengths, rows or self._batch_size, self._device))

        def forward(batch_rows: np.ndarray) -> dict[str, np.ndarray]:
            return self._candidates_of(self.batch(store, batch_rows), count, max_answer_len)

        with ProgressBar("answering", len(store), "window", progress is not False, lines=bool(progress)) as bar:
            parallel = self._parallel and not changes_in_forward(self._model)
            for part in on_all_cores(forward, batches) if parallel else map(forward, batches):
                parts.append(part)
                bar.advance(len(part["feature_id"]))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.argsort(columns["feature_id"])
        columns = {name: values[order] for name, values in columns.items()}
        normalizer = columns.pop("normalizer")
        if not np.isfinite(normalizer).all():
            raise UserError("the model's logits are infinite or NaN: its weights are damaged, or its training diverged")
        return Candidates(**columns), normalizer

    @torch.inference_mode()
    def _candidates_of(self, batch: Batch, count: int, max_answer_len: int) -> dict[str, np.ndarray]:
        """Candidates and normalizer of each row of a batch: columns `[rows, count]` and `[rows]`."""
        outputs = self._model(**self.head.inputs(batch))
        starts = batch.context_begin, batch.context_end
        columns = candidate_columns(batch, self.head.best(outputs, batch, starts, count, max_answer_len), count)
        if self.head.null_score_is_odds:  # a beam head's scores are log-probabilities already
            columns["normalizer"] = torch.zeros_like(columns["null_start_logit"])
        else:
            columns["normalizer"] = normalizers(batch, outputs.start_logits, outputs.end_logits)
        return {name: values.cpu().numpy() for name, values in columns.items()}


def _no_candidates(count: int) -> dict[str, np.ndarray]:
    """The columns of `WindowForward._candidates_of` without rows."""
    places, logits, scores = np.zeros((0, count), np.int32), np.zeros((0, count), np.float32), np.zeros(0, np.float32)
    return {
        "feature_id": np.zeros(0, np.int64),
        "start": places,
        "end": places,
        "start_logit": logits,
        "end_logit": logits,
        "null_start_logit": scores,
        "null_end_logit": scores,
        "normalizer": scores,
    }
