"""Collate: how rows become the tensors of a micro-batch, padded to one length or packed end to end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from qa_deepspeed.qa.features.sampler import padded_length
from qa_deepspeed.qa.features.store import FeatureRows
from qa_deepspeed.qa.features.windows import ranges, splits_of

DUMMY_ROW = -1
"""Feature id of a row that only makes the ranks' work equal."""


@dataclass(frozen=True)
class Packing:
    """How a model wants rows that are laid end to end."""

    first_position: int
    """Position id of a row's first token: 0, or pad_token_id + 1 in models of RoBERTa's kind."""
    token_multiple: int = 1
    """Micro-batches are filled up to a multiple of this many tokens: fewer shapes on GPUs."""
    row_length: int | None = None
    """Tokens of the longest row of all; if given, shapes do not depend on a batch's own, and a filler row is always
    there."""


@dataclass(frozen=True)
class Layout:
    """How a model wants its rows, and which inputs it takes; without `packing` rows are padded to one length."""

    pad_token_id: int
    pad_type_id: int
    padding_side: str
    columns: frozenset[str]
    lang_id: int = 0
    packing: Packing | None = None


class RowLogits(NamedTuple):
    """A span head's logits by row, each `[rows, length]`."""

    start_logits: torch.Tensor
    end_logits: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Positions (`[rows]`, int64) count from the left end of the padded row; packed rows have no padding
    on the left."""

    inputs: dict[str, Any]  # the model's arguments: [rows, length] each, or [1, tokens] and where the rows lie
    start: torch.Tensor
    end: torch.Tensor
    gold_starts: torch.Tensor  # [rows, golds], -1 fills: all gold spans if the features keep them, else start and end
    gold_ends: torch.Tensor
    null_position: torch.Tensor
    context_begin: torch.Tensor
    context_end: torch.Tensor
    shift: torch.Tensor  # padding left of each row; subtract it for positions in the unpadded row
    length: torch.Tensor  # tokens of each unpadded row
    weight: torch.Tensor  # float32 [rows]: 1, or 0 for a dummy row
    feature_id: np.ndarray  # int64 [rows], DUMMY_ROW for a dummy row
    tokens: int  # real ones, without padding and dummy rows
    place: torch.Tensor | None = None  # packed: int64 [rows, length], where each token lies in the sequence
    soft_start: torch.Tensor | None = None  # float32 [rows, length], a teacher's softened probabilities
    soft_end: torch.Tensor | None = None

    @property
    def computed_tokens(self) -> int:
        """Tokens that the model works on, padding and dummy rows included."""
        count: int = self.inputs["input_ids"].numel()
        return count

    def by_row(self, outputs: Any) -> Any:
        """A model's outputs with logits `[rows, length]`, also where the rows are packed.

        There positions beyond a row's end repeat its first token.
        """
        place = self.place
        if place is None:
            return outputs
        start, end = (
            logits.flatten().index_select(0, place.flatten()).view(place.shape)
            for logits in (outputs.start_logits, outputs.end_logits)
        )
        return RowLogits(start, end)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`; a GPU copies them from pinned memory, without a wait."""
        if device.type == "cpu":
            return self
        return self.with_tensors([one.pin_memory().to(device, non_blocking=True) for one in self.tensors()])

    def tensors(self) -> list[torch.Tensor]:
        """The model's arguments that are tensors, then the other tensors, in a fixed order."""
        others = (getattr(self, field.name) for field in dataclasses.fields(self))
        return [one for one in (*self.inputs.values(), *others) if torch.is_tensor(one)]

    def with_tensors(self, tensors: list[torch.Tensor]) -> Batch:
        """The same batch with other tensors in the order of `tensors`."""
        rest = iter(tensors)
        inputs = {name: next(rest) if torch.is_tensor(one) else one for name, one in self.inputs.items()}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        others: dict[str, Any] = {name: next(rest) for name, one in fields.items() if torch.is_tensor(one)}
        return dataclasses.replace(self, inputs=inputs, **others)


def make_batch(take: Callable[[np.ndarray], FeatureRows], rows: np.ndarray, layout: Layout) -> Batch:
    """Collate: rows padded to one length, or packed. An empty `rows` gives one dummy row (row 0 with weight 0)."""
    dummy = len(rows) == 0
    features = take(rows if not dummy else np.zeros(1, np.int64))
    lengths = np.diff(features.row_splits)
    length = padded_length(int(lengths.max()))
    on_the_left = layout.packing is None and layout.padding_side == "left"
    shift = length - lengths if on_the_left else np.zeros_like(lengths)
    pack = layout.packing is not None
    inputs, place = (
        _packed_inputs(features, layout, length) if pack else (_padded_inputs(features, layout, shift), None)
    )

    def position(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((values + shift).astype(np.int64))

    start, end = position(features.start), position(features.end)
    return Batch(
        inputs,
        start,
        end,
        *_golds(features, shift, start, end),
        position(features.null_position),
        position(features.context_begin),
        position(features.context_end),
        torch.from_numpy(shift.astype(np.int64)),
        torch.from_numpy(lengths.astype(np.int64)),
        torch.full((len(lengths),), 0.0 if dummy else 1.0),
        np.full(1, DUMMY_ROW, np.int64) if dummy else features.feature_id,
        0 if dummy else len(features.input_ids),
        place,
        *_soft_targets(features, shift, length if place is None else place.shape[1]),
    )


def _padded_inputs(features: FeatureRows, layout: Layout, shift: np.ndarray) -> dict[str, Any]:
    """The model's arguments, each `[rows, length]`; `shift` `[rows]` is the padding left of each row."""
    lengths = np.diff(features.row_splits)
    length = padded_length(int(lengths.max()))
    row = np.repeat(np.arange(len(lengths)), lengths)
    column = np.arange(len(features.input_ids)) - np.repeat(features.row_splits[:-1] - shift, lengths)

    def padded(values: np.ndarray | int, fill: int) -> torch.Tensor:
        block = np.full((len(lengths), length), fill, np.int64)
        block[row, column] = values
        return torch.from_numpy(block)

    inputs = {"input_ids": padded(features.input_ids, layout.pad_token_id), "attention_mask": padded(1, 0)}
    if "token_type_ids" in layout.columns and features.token_type_ids is not None:
        inputs["token_type_ids"] = padded(features.token_type_ids, layout.pad_type_id)
    if "langs" in layout.columns:
        inputs["langs"] = torch.full_like(inputs["input_ids"], layout.lang_id)
    return inputs


def _packed_inputs(features: FeatureRows, layout: Layout, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    """The model's arguments for rows laid end to end, `[1, tokens]` each, and `Batch.place` `[rows, length]`.

    Where rows begin and end is passed by the names that Transformers' attention functions know: `cu_seq_lens_q` and
    `cu_seq_lens_k` int32 `[rows + 1]`, `max_length_q` and `max_length_k`. Tokens that fill the sequence up are a row of
    their own, which `place` does not name.
    """
    assert layout.packing is not None
    splits, multiple, row_length = features.row_splits, layout.packing.token_multiple, layout.packing.row_length
    lengths = np.diff(splits)
    filler = -int(splits[-1]) % multiple
    length = length if row_length is None else row_length

    def packed(values: np.ndarray, fill: int) -> torch.Tensor:
        return torch.from_numpy(np.pad(values.astype(np.int64), (0, filler), constant_values=fill)[np.newaxis])

    first = layout.packing.first_position
    positions = np.arange(splits[-1]) - np.repeat(splits[:-1], lengths) + first
    fills = filler or row_length is not None
    bounds = torch.from_numpy(np.append(splits, [splits[-1] + filler] if fills else []).astype(np.int32))
    longest = max(length, filler if row_length is None else multiple)
    inputs = {
        "input_ids": packed(features.input_ids, layout.pad_token_id),
        "position_ids": packed(positions, first),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if "token_type_ids" in layout.columns and features.token_type_ids is not None:
        inputs["token_type_ids"] = packed(features.token_type_ids, layout.pad_type_id)
    token = np.arange(length)
    place = splits[:-1, np.newaxis] + np.where(token < lengths[:, np.newaxis], token, 0)
    return inputs, torch.from_numpy(place.astype(np.int64))


def _soft_targets(
    features: FeatureRows, shift: np.ndarray, length: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The teacher's probabilities of each position, `[rows, length]` twice, 0 where no answer is possible; None without
    a teacher."""
    if features.soft_start is None or features.soft_end is None:
        return None, None
    counts = features.context_end - features.context_begin + 1
    row = np.repeat(np.arange(len(counts)), counts)
    column = ranges(features.context_begin - 1 + shift, counts)
    column[splits_of(counts)[:-1]] = features.null_position + shift  # comes first, before the context
    blocks = []
    for values in (features.soft_start, features.soft_end):
        block = np.zeros((len(counts), length), np.float32)
        block[row, column] = values
        blocks.append(torch.from_numpy(block))
    return blocks[0], blocks[1]


def _golds(
    features: FeatureRows, shift: np.ndarray, start: torch.Tensor, end: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """All gold spans of each row, `[rows, golds]` twice; the label of a row that holds none is its only one."""
    if features.gold_splits is None or features.gold_starts is None or features.gold_ends is None:
        return start.unsqueeze(1), end.unsqueeze(1)
    counts = np.diff(features.gold_splits)
    row = np.repeat(np.arange(len(counts)), counts)
    column = np.arange(len(row)) - np.repeat(features.gold_splits[:-1], counts)
    blocks = []
    for golds, label in ((features.gold_starts, start), (features.gold_ends, end)):
        block = np.full((len(counts), max(1, int(counts.max(initial=0)))), -1, np.int64)
        block[:, 0] = label.numpy()
        block[row, column] = golds + shift[row]
        blocks.append(torch.from_numpy(block))
    return blocks[0], blocks[1]
