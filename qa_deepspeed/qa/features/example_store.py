"""Examples as shards of Arrow columns, and the memory-mapped store that reads them back.

Columns of a shard: contexts, questions (each distinct text once), example_ids, example_context and example_question
(indexes of an example's texts), answer_splits `[examples + 1]`, answer_texts, answer_starts, answer_lengths (in
characters).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from qa_deepspeed.qa.data.examples import NO_GOLD, Answer, Example
from qa_deepspeed.qa.features.arrow import Column, ColumnTable, numbers

FIRST_SHARDS, SMALL_SHARD, LARGE_SHARD = 32, 2048, 8192
"""Examples of a shard: small ones first, so that a few processes share a usual set evenly; large ones later, so that
millions of examples make few files."""

SHARD_CHARACTERS = 1_000_000
"""A shard is full sooner once its distinct contexts have this many characters: its tokens must fit in memory."""


def shards_of(examples: Iterable[Example]) -> Iterator[dict[str, Column]]:
    """Cut a stream of examples into shards; the cuts depend on the examples alone."""
    shard: list[Example] = []
    contexts: dict[str, int] = {}
    characters = number = 0
    for example in examples:
        fresh = len(example.context) if example.context not in contexts else 0
        limit = SMALL_SHARD if number < FIRST_SHARDS else LARGE_SHARD
        if shard and (len(shard) >= limit or characters + fresh > SHARD_CHARACTERS):
            yield _columns(shard, contexts)
            shard, contexts, characters, number = [], {}, 0, number + 1
            fresh = len(example.context)
        contexts.setdefault(example.context, len(contexts))
        characters += fresh
        shard.append(example)
    if shard:
        yield _columns(shard, contexts)


def _columns(shard: list[Example], contexts: dict[str, int]) -> dict[str, Column]:
    questions: dict[str, int] = {}
    answers = [answer for example in shard for answer in example.answers]
    splits = np.zeros(len(shard) + 1, dtype=np.int64)
    np.cumsum([len(example.answers) for example in shard], out=splits[1:])
    return {
        "example_question": np.array(
            [questions.setdefault(example.question, len(questions)) for example in shard], dtype=np.int32
        ),
        "example_context": np.array([contexts[example.context] for example in shard], dtype=np.int32),
        "answer_splits": splits,
        "answer_starts": np.array([answer.start for answer in answers], dtype=np.int32),
        "answer_lengths": np.array([len(answer.text) for answer in answers], dtype=np.int32),
        "example_ids": [example.example_id for example in shard],
        "contexts": list(contexts),
        "questions": list(questions),
        "answer_texts": [answer.text for answer in answers],
    }


def has_gold(columns: ColumnTable) -> np.ndarray:
    """Whether the gold answers of each example of a shard are known (`Example.has_gold`), bool `[examples]`."""
    splits = columns.array("answer_splits")
    known = np.ones(len(splits) - 1, dtype=bool)
    unknown = np.flatnonzero(columns.array("answer_starts") == NO_GOLD[0].start)
    known[np.searchsorted(splits, unknown, side="right") - 1] = False
    return known


WITHOUT_GOLD = "without_gold"
"""Name of the count of examples whose gold answers are not known; features that have none lack it."""


class ExampleStore:
    """The examples of a cache entry, in order, read from its files as they are asked for."""

    def __init__(self, splits: np.ndarray, open_shard: Callable[[int], ColumnTable]):
        """splits int64 `[shards + 1]`: examples before each shard; open_shard gives the columns of one."""
        self._splits = splits
        self._open_shard = open_shard

    def __len__(self) -> int:
        return int(self._splits[-1])

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index = index % len(self)
        shard = int(np.searchsorted(self._splits, index, side="right")) - 1
        place = index - int(self._splits[shard])
        return next(_examples(self._open_shard(shard), place, place + 1))

    def __iter__(self) -> Iterator[Example]:
        for shard in range(len(self._splits) - 1):
            yield from _examples(self._open_shard(shard), 0, int(self._splits[shard + 1] - self._splits[shard]))

    def ids_and_contexts(self, begin: int, end: int) -> tuple[list[str], list[str]]:
        """Ids and contexts of the examples [begin, end): many times faster than making the whole examples."""
        ids: list[str] = []
        contexts: list[str] = []
        for shard in range(len(self._splits) - 1):
            first = max(begin - int(self._splits[shard]), 0)
            last = min(end, int(self._splits[shard + 1])) - int(self._splits[shard])
            if first < last:
                columns = self._open_shard(shard)
                ids += columns.strings("example_ids")[first:last].to_pylist()
                contexts += _texts(columns, "contexts", columns.array("example_context")[first:last])
        return ids, contexts

    def has_gold(self) -> np.ndarray:
        """Whether the gold answers of each example are known, bool `[examples]`."""
        parts = [has_gold(self._open_shard(shard)) for shard in range(len(self._splits) - 1)]
        return np.concatenate([np.zeros(0, dtype=bool), *parts])

    def unplaced(self) -> np.ndarray:
        """Whether an example has gold answers, none of which has a place in its context, bool `[examples]`."""
        parts = [np.zeros(0, dtype=bool)]
        for shard in range(len(self._splits) - 1):
            columns = self._open_shard(shard)
            splits, starts = columns.array("answer_splits"), columns.array("answer_starts")
            answers = np.diff(splits)
            owner = np.repeat(np.arange(len(answers)), answers)
            placed = np.bincount(owner[starts >= 0], minlength=len(answers))
            parts.append((answers > 0) & (placed == 0) & has_gold(columns))
        return np.concatenate(parts)

    @property
    def ids(self) -> list[str]:
        """The id of every example, in order."""
        shards = range(len(self._splits) - 1)
        return [one for shard in shards for one in self._open_shard(shard).strings("example_ids").to_pylist()]


def _examples(columns: ColumnTable, begin: int, end: int) -> Iterator[Example]:
    """The examples [begin, end) of a shard."""
    splits = columns.array("answer_splits")[begin : end + 1]
    first, last = int(splits[0]), int(splits[-1])
    texts = columns.strings("answer_texts")[first:last].to_pylist()
    answers = list(map(Answer, texts, columns.array("answer_starts")[first:last].tolist()))
    bounds = (splits - first).tolist()
    ids = columns.strings("example_ids")[begin:end].to_pylist()
    questions = _texts(columns, "questions", columns.array("example_question")[begin:end])
    contexts = _texts(columns, "contexts", columns.array("example_context")[begin:end])
    for number, (example_id, question, context) in enumerate(zip(ids, questions, contexts, strict=True)):
        yield Example(example_id, question, context, tuple(answers[bounds[number] : bounds[number + 1]]))


def _texts(columns: ColumnTable, name: str, places: np.ndarray) -> list[str]:
    """The texts of a column at these places; each distinct one is made once."""
    distinct, place = np.unique(places, return_inverse=True)
    texts = columns.strings(name).take(numbers(distinct)).to_pylist()
    return [texts[i] for i in place.tolist()]
