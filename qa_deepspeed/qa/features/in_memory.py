"""Features of questions that are in memory: for answering, where nothing is kept and no gold answer is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.data.read_report import ReadReport
from qa_deepspeed.qa.features.arrow import Column, ColumnTable
from qa_deepspeed.qa.features.build import FeatureSettings, build_features
from qa_deepspeed.qa.features.encoding import FastEncoder, Tokens
from qa_deepspeed.qa.features.example_store import ExampleStore, shards_of
from qa_deepspeed.qa.features.families import Family
from qa_deepspeed.qa.features.slow_tokenizers import PythonEncoder
from qa_deepspeed.qa.features.store import FeatureShard, FeatureStore
from qa_deepspeed.qa.features.template import Template, check_template, find_template
from qa_deepspeed.qa.features.windows import splits_of


class MemoryTable(ColumnTable):
    """Columns that were never written to a file."""

    def __init__(self, columns: Mapping[str, Column]):
        self._columns = {
            name: column if isinstance(column, np.ndarray) else pa.array(column, pa.large_string())
            for name, column in columns.items()
        }

    def array(self, name: str) -> np.ndarray:
        """A numeric column."""
        return self._columns[name]

    def strings(self, name: str) -> pa.LargeStringArray:
        """A column of strings."""
        return self._columns[name]


class FeatureMaker:
    """Turns questions into features as training and evaluation do, for one tokenizer."""

    def __init__(self, tokenizer: Any, family: Family):
        """Raises UserError if the tokenizer's rows are not two texts with fixed tokens around them."""
        self._encoder = FastEncoder(tokenizer, words=True) if tokenizer.is_fast else _BlankWords(tokenizer)
        self.template: Template = find_template(tokenizer, family, self._encoder)
        check_template(tokenizer, self.template, self._encoder)
        self._sends_types = family.sends_token_type_ids

    def features(self, examples: Iterable[Example], settings: FeatureSettings) -> AnswerStore:
        """The features of the examples. The settings must pass `check_settings`."""
        texts, features, counts = [], [], []
        for shard in shards_of(examples):
            columns = MemoryTable(shard)
            arrays, count = build_features(columns, self._encoder, self.template.special_tokens, settings, False)
            texts.append(columns)
            features.append(MemoryTable(arrays))
            counts.append(count)
        example_splits = splits_of(np.array([count["examples"] for count in counts], np.int64))
        shards = [FeatureShard(columns) for columns in features]
        lengths = [shard.row_lengths(self.template.special_tokens) for shard in shards]
        owners = [shard.feature_example + before for shard, before in zip(shards, example_splits, strict=False)]
        index = MemoryTable(
            {
                "lengths": np.concatenate([np.zeros(0, np.int32), *lengths]),
                "example_index": np.concatenate([np.zeros(0, np.int64), *owners]),
            }
        )
        return AnswerStore(
            fingerprint="",
            counts=dict(sum(map(Counter, counts), Counter())),
            built=True,
            report=ReadReport,
            template=self.template,
            sends_token_type_ids=self._sends_types,
            all_answers=False,
            shard_splits=splits_of(np.array([count["features"] for count in counts], np.int64)),
            index=index,
            open_shard=features.__getitem__,
            examples=ExampleStore(example_splits, texts.__getitem__),
        )


class AnswerStore(FeatureStore):
    """Features that also know which tokens make up a word."""

    def word_spans(
        self, rows: np.ndarray, start_positions: np.ndarray, end_positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`character_spans`, widened to whole words, as far as these are in the window.

        Args: int arrays `[spans]`: feature number and token positions in its unpadded row.
        """
        starts, ends = np.array(start_positions, np.int64), np.array(end_positions, np.int64)
        for shard, places, features in self._by_shard(np.asarray(rows, np.int64)):
            at = self._context_position(shard, features)
            window, length = shard.window_start(features), shard.window_length[features]
            first_of_word, last_of_word = shard.word_bounds()
            first, last = window + starts[places] - at, window + ends[places] - at
            starts[places] = np.maximum(first_of_word[first], window) - window + at
            ends[places] = np.minimum(last_of_word[last], window + length - 1) - window + at
        return self.character_spans(rows, starts, ends)


class _BlankWords(PythonEncoder):
    """A tokenizer without a fast form names no words: what stands between blanks is one."""

    def encode(self, texts: Sequence[str], offsets: bool) -> Tokens:
        """Encode texts, with word numbers where offsets are asked for."""
        tokens = super().encode(texts, offsets)
        if not offsets:
            return tokens
        words = np.full(len(tokens.ids), -1, np.int32)
        for text, begin, end in zip(texts, tokens.splits[:-1], tokens.splits[1:], strict=True):
            blank = np.fromiter((character.isspace() for character in text), bool, len(text))
            number = np.append(np.cumsum(blank), 0)  # a token that stands at the end has no character of its own
            words[begin:end] = number[tokens.begin[begin:end]]
        return Tokens(tokens.ids, tokens.begin, tokens.end, tokens.splits, words)
