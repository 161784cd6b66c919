"""Reading features: memory-mapped shards, rows put together by array operations as they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qa_deepspeed.qa.data.reading import ReadReport
from qa_deepspeed.qa.features.arrow import ColumnTable
from qa_deepspeed.qa.features.example_store import WITHOUT_GOLD, ExampleStore
from qa_deepspeed.qa.features.template import Special, Template
from qa_deepspeed.qa.features.windows import ranges, splits_of

Golds = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class FeatureRows:
    """Unpadded rows, ragged. Token positions count from the start of the unpadded row.

    feature_id int64 `[rows]`; row_splits int64 `[rows + 1]`; input_ids int32 and token_type_ids int8 `[tokens]` (the
    latter None where the model takes none); start, end int32 `[rows]`: the labels, both inside, the null position
    where the window does not hold the answer; null_position int32 `[rows]`; context_begin, context_end int32 `[rows]`:
    the context tokens [begin, end). With `answers="all"` gold_splits int64 `[rows + 1]`, gold_starts and gold_ends
    int32: every gold span that the window holds. With teachers soft_start, soft_end float32: of each row their softened
    probabilities of the null position and the context tokens, one after another.
    """

    feature_id: np.ndarray
    row_splits: np.ndarray
    input_ids: np.ndarray
    token_type_ids: np.ndarray | None
    start: np.ndarray
    end: np.ndarray
    null_position: np.ndarray
    context_begin: np.ndarray
    context_end: np.ndarray
    gold_starts: np.ndarray | None = None
    gold_ends: np.ndarray | None = None
    gold_splits: np.ndarray | None = None
    soft_start: np.ndarray | None = None
    soft_end: np.ndarray | None = None


class FeatureShard:
    """The arrays of one shard, all int32 but the splits (int64).

    context_ids, context_begin, context_end `[context tokens]` by context_splits; question_ids by question_splits;
    example_question, example_context `[examples]`; gold_first, gold_last (context tokens) by gold_splits;
    feature_example, window_begin, window_length (context tokens) `[features]`. Features that are made for answering
    have context_word `[context tokens]` too.
    """

    def __init__(self, columns: ColumnTable):
        self._columns = columns
        self.context_ids = columns.array("context_ids")
        self.context_begin = columns.array("context_begin")
        self.context_end = columns.array("context_end")
        self.context_splits = columns.array("context_splits")
        self.question_ids = columns.array("question_ids")
        self.question_splits = columns.array("question_splits")
        self.example_question = columns.array("example_question")
        self.example_context = columns.array("example_context")
        self.gold_first = columns.array("gold_first")
        self.gold_last = columns.array("gold_last")
        self.gold_splits = columns.array("gold_splits")
        self.feature_example = columns.array("feature_example")
        self.window_begin = columns.array("window_begin")
        self.window_length = columns.array("window_length")

    def question_lengths(self, features: np.ndarray) -> np.ndarray:
        """Tokens of the question of each feature, int64 `[features]`."""
        question = self.example_question[self.feature_example[features]]
        lengths: np.ndarray = self.question_splits[question + 1] - self.question_splits[question]
        return lengths

    def row_lengths(self, special_tokens: int) -> np.ndarray:
        """Tokens of the unpadded row of every feature, int32 `[features]`."""
        every = np.arange(len(self.feature_example))
        lengths: np.ndarray = (self.question_lengths(every) + self.window_length + special_tokens).astype(np.int32)
        return lengths

    def word_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last token of the word that each context token is of, int64 `[context tokens]` twice.

        A token that is of no word stands alone. Only for features that have context_word.
        """
        word = self._columns.array("context_word")
        changes = np.ones(len(word) + 1, dtype=bool)
        changes[1:-1] = (word[1:] != word[:-1]) | (word[1:] < 0)
        changes[self.context_splits] = True
        borders = np.flatnonzero(changes)
        lengths = np.diff(borders)
        return np.repeat(borders[:-1], lengths), np.repeat(borders[1:] - 1, lengths)

    def window_start(self, features: np.ndarray) -> np.ndarray:
        """Where the window of each feature begins in the context arrays, int64 `[features]`."""
        context = self.example_context[self.feature_example[features]]
        starts: np.ndarray = self.context_splits[context] + self.window_begin[features]
        return starts


class FeatureStore:
    """The features of a cache entry; those of one example are adjacent, in example order.

    fingerprint: the content key. counts: features, examples and what became of them. built: whether this process's
    call found the entry missing. special_tokens: how many each row has. lengths int32 `[features]`: tokens of each
    unpadded row. example_index int64 `[features]`: index into `examples`, which includes examples without a feature (no
    tokens in the context). files: the names of the files, where examples are known by file (`DataSource.by_file`).
    """

    def __init__(
        self,
        *,
        fingerprint: str,
        counts: dict[str, int],
        built: bool,
        report: Callable[[], ReadReport],
        template: Template,
        sends_token_type_ids: bool,
        all_answers: bool,
        shard_splits: np.ndarray,
        index: ColumnTable,
        open_shard: Callable[[int], ColumnTable],
        examples: ExampleStore,
        files: Sequence[str] = (),
        examples_by_file: Sequence[int] = (),
    ):
        """shard_splits int64 `[shards + 1]`: features before each shard. examples_by_file: of the first of `files`."""
        self.fingerprint = fingerprint
        self.counts = counts
        self.built = built
        self.examples = examples
        self.files = tuple(files)
        self._examples_by_file = tuple(examples_by_file)
        self.lengths = index.array("lengths")
        self.example_index = index.array("example_index")
        self._load_report = report
        self.special_tokens = template.special_tokens
        self._template = template
        self._sends_types = sends_token_type_ids
        self._all_answers = all_answers
        self._shard_splits = shard_splits
        self._open_shard = open_shard
        self._shards: dict[int, FeatureShard] = {}

    @property
    def without_gold(self) -> int:
        """Number of examples whose gold answers are not known."""
        return self.counts.get(WITHOUT_GOLD, 0)

    def __len__(self) -> int:
        return len(self.lengths)

    def file_of_examples(self) -> np.ndarray | None:
        """The number of each example's file among `files`, int32 `[examples]`; None where it is not known."""
        if not self.files:
            return None
        return np.repeat(np.arange(len(self._examples_by_file), dtype=np.int32), self._examples_by_file)

    @property
    def rows_by_file(self) -> np.ndarray:
        """The number of features of each file, int64 `[files]`; of all together where `files` is empty."""
        owner = self.file_of_examples()
        if owner is None:
            return np.array([len(self)])
        return np.bincount(owner[self.example_index], minlength=len(self.files))

    @cached_property
    def report(self) -> ReadReport:
        """What became of each question of the input."""
        return self._load_report()

    def take(self, rows: np.ndarray) -> FeatureRows:
        """The features with these numbers, in this order.

        Args: rows: int `[rows]`, any order, repeats allowed.
        """
        rows = np.asarray(rows, dtype=np.int64)
        splits = splits_of(self.lengths[rows])
        filler = _RowFiller(self._template, splits, self._sends_types)
        nothing = np.zeros(0, dtype=np.int64)
        golds: list[Golds] = [(nothing, nothing, nothing)]
        for shard, places, features in self._by_shard(rows):
            golds.append(filler.fill(shard, places, features))
        extra: dict[str, Any] = {}
        if self._all_answers:
            owner, starts, ends = (np.concatenate(part) for part in zip(*golds, strict=True))
            order = np.argsort(owner, kind="stable")
            extra = {
                "gold_starts": starts[order].astype(np.int32),
                "gold_ends": ends[order].astype(np.int32),
                "gold_splits": splits_of(np.bincount(owner, minlength=len(rows))),
            }
        return FeatureRows(
            rows,
            splits,
            filler.ids,
            filler.types,
            filler.start,
            filler.end,
            filler.null_position,
            filler.context_begin,
            filler.context_end,
            **extra,
        )

    def character_spans(
        self, rows: np.ndarray, start_positions: np.ndarray, end_positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Context characters [begin, end) that the tokens start..end (both inside) of these features cover.

        Args: int arrays `[spans]`: feature number and token positions in its unpadded row.
        Returns: int64 `[spans]` twice; (0, 0) where a position is not in the context.
        """
        rows = np.asarray(rows, dtype=np.int64)
        begin, end = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
        for shard, places, features in self._by_shard(rows):
            at = self._context_position(shard, features)
            first = np.asarray(start_positions)[places] - at
            last = np.asarray(end_positions)[places] - at
            inside = (first >= 0) & (first <= last) & (last < shard.window_length[features])
            window = shard.window_start(features)[inside]
            begin[places[inside]] = shard.context_begin[window + first[inside]]
            end[places[inside]] = shard.context_end[window + last[inside]]
        return begin, end

    def windows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First context token and number of context tokens of each of these features; int64 `[rows]` twice."""
        rows = np.asarray(rows, dtype=np.int64)
        begin, length = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
        for shard, places, features in self._by_shard(rows):
            begin[places], length[places] = shard.window_begin[features], shard.window_length[features]
        return begin, length

    def _context_position(self, shard: FeatureShard, features: np.ndarray) -> np.ndarray:
        """Where the context begins in the unpadded row of each feature, int64 `[features]`."""
        template = self._template
        at = np.full(len(features), len(template.before.ids), dtype=np.int64)
        return at if template.context_first else at + shard.question_lengths(features) + len(template.between.ids)

    def _by_shard(self, rows: np.ndarray) -> Iterator[tuple[FeatureShard, np.ndarray, np.ndarray]]:
        """For each shard that holds some of the rows: it, their places in `rows`, their numbers in the shard."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"feature {int(rows.max())} of {len(self)}")
        shards = np.searchsorted(self._shard_splits, rows, side="right") - 1
        order = np.argsort(shards, kind="stable")
        present, starts = np.unique(shards[order], return_index=True)
        for number, places in zip(present.tolist(), np.split(order, starts[1:]), strict=False):
            if number not in self._shards:
                self._shards[number] = FeatureShard(self._open_shard(number))
            yield self._shards[number], places, rows[places] - self._shard_splits[number]


class _RowFiller:
    """The arrays of a set of rows, filled shard by shard."""

    def __init__(self, template: Template, splits: np.ndarray, types: bool):
        rows = len(splits) - 1
        self._template = template
        self._splits = splits
        self.ids = np.empty(int(splits[-1]), dtype=np.int32)
        self.types = np.empty(int(splits[-1]), dtype=np.int8) if types else None
        self.start, self.end, self.context_begin, self.context_end = np.empty((4, rows), dtype=np.int32)
        lengths = np.diff(splits)
        null = np.full(rows, template.null_offset) if template.null_from_start else lengths - 1 - template.null_offset
        self.null_position = null.astype(np.int32)

    def fill(self, shard: FeatureShard, places: np.ndarray, features: np.ndarray) -> Golds:
        """Put these features of the shard at these places `[features]`; returns the gold spans they hold."""
        template = self._template
        example = shard.feature_example[features]
        question_lengths = shard.question_lengths(features)
        window_lengths = shard.window_length[features].astype(np.int64)
        question = (shard.question_ids, shard.question_splits[shard.example_question[example]], question_lengths)
        context = (shard.context_ids, shard.window_start(features), window_lengths)
        texts = [(*question, template.question_type), (*context, template.context_type)]
        if template.context_first:
            texts.reverse()
        at = self._splits[places]
        at = self._put_special(at, template.before)
        at = self._put_text(at, *texts[0])
        at = self._put_special(at, template.between)
        at = self._put_text(at, *texts[1])
        self._put_special(at, template.after)
        return self._label(shard, places, features, question_lengths)

    def _put_special(self, at: np.ndarray, special: Special) -> np.ndarray:
        for offset, (token, kind) in enumerate(zip(special.ids, special.types, strict=True)):
            self.ids[at + offset] = token
            if self.types is not None:
                self.types[at + offset] = kind
        return at + len(special.ids)

    def _put_text(
        self, at: np.ndarray, source: np.ndarray, starts: np.ndarray, lengths: np.ndarray, kind: int
    ) -> np.ndarray:
        where = ranges(at, lengths)
        self.ids[where] = source[ranges(starts, lengths)]
        if self.types is not None:
            self.types[where] = kind
        end: np.ndarray = at + lengths
        return end

    def _label(
        self, shard: FeatureShard, places: np.ndarray, features: np.ndarray, question_lengths: np.ndarray
    ) -> Golds:
        template = self._template
        begin = np.full(len(features), len(template.before.ids), dtype=np.int64)
        if not template.context_first:
            begin += question_lengths + len(template.between.ids)
        self.context_begin[places] = begin
        self.context_end[places] = begin + shard.window_length[features]
        self.start[places] = self.end[places] = self.null_position[places]
        owner, starts, ends = self._golds(shard, places, features)
        chosen, first = np.unique(owner, return_index=True)
        self.start[chosen], self.end[chosen] = starts[first], ends[first]
        return owner, starts, ends

    def _golds(self, shard: FeatureShard, places: np.ndarray, features: np.ndarray) -> Golds:
        """Gold spans that the windows hold: place of the row, token positions of start and end; int64 `[golds]`."""
        example = shard.feature_example[features]
        counts = shard.gold_splits[example + 1] - shard.gold_splits[example]
        gold = ranges(shard.gold_splits[example], counts)
        row = np.repeat(np.arange(len(features)), counts)
        first = shard.gold_first[gold].astype(np.int64) - shard.window_begin[features][row]
        last = shard.gold_last[gold].astype(np.int64) - shard.window_begin[features][row]
        inside = (first >= 0) & (last < shard.window_length[features][row])
        place = places[row[inside]]
        return place, first[inside] + self.context_begin[place], last[inside] + self.context_begin[place]
