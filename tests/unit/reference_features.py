"""Features the slow, plain way: the tokenizer's own rows, and labels found by looking at every token."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.qa.features.families import Family
from qa_deepspeed.qa.features.store import FeatureStore


@dataclass
class Row:
    """One window as the tokenizer gives it; `offsets` are those of its context tokens."""

    ids: list[int]
    types: list[int]
    offsets: list[tuple[int, int]]
    context_begin: int
    first_token: int
    null: int
    golds: list[tuple[int, int]]


def tokenizer_rows(tokenizer: Any, family: Family, settings: FeatureSettings, example: Example) -> list[Row]:
    """What the tokenizer makes of the pair as text. The question must not be longer than max_query_length."""
    question_tokens = len(token_ids(tokenizer, example.question))
    assert question_tokens <= settings.max_query_length
    room = settings.max_seq_length - question_tokens - tokenizer.num_special_tokens_to_add(pair=True)
    overlap = settings.doc_stride if settings.doc_stride_is == "overlap" else room - settings.doc_stride
    pair = (example.context, example.question) if family.context_first else (example.question, example.context)
    out = tokenizer(
        *pair,
        truncation="only_first" if family.context_first else "only_second",
        max_length=settings.max_seq_length,
        stride=overlap,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
        split_special_tokens=True,
    )
    alone = tokenizer(example.context, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    whole = alone["offset_mapping"]
    golds = [span for answer in located(example, settings) if (span := covering(whole, answer)) is not None]
    which = 0 if family.context_first else 1
    rows = []
    for number, ids in enumerate(out["input_ids"]):
        places = [place for place, text in enumerate(out.sequence_ids(number)) if text == which]
        if not places:
            return []
        begin, first = places[0], number * (room - overlap)
        inside = [
            (gold[0] - first + begin, gold[1] - first + begin)
            for gold in golds
            if first <= gold[0] and gold[1] < first + len(places)
        ]
        rows.append(
            Row(
                ids,
                out["token_type_ids"][number],
                [tuple(out["offset_mapping"][number][place]) for place in places],
                begin,
                first,
                null_position(tokenizer, family, ids),
                list(dict.fromkeys(inside)),
            )
        )
    return rows


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text alone; what spells a special token is text."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def located(example: Example, settings: FeatureSettings) -> list[tuple[int, int]]:
    """Characters of the answers that may be labelled."""
    spans = [(one.start, one.start + len(one.text)) for one in example.answers if one.start >= 0]
    return spans[:1] if settings.answers == "first" else spans


def covering(offsets: list[tuple[int, int]], span: tuple[int, int]) -> tuple[int, int] | None:
    """First and last of the tokens that overlap the characters."""
    tokens = [number for number, (begin, end) in enumerate(offsets) if begin < span[1] and end > span[0]]
    return (min(tokens), max(tokens)) if tokens else None


def null_position(tokenizer: Any, family: Family, ids: list[int]) -> int:
    """The only CLS token of the row, or the last token."""
    if family.null_rule == "last":
        return len(ids) - 1
    cls = tokenizer.cls_token_id
    return 0 if ids[0] == cls else len(ids) - 1 - ids[::-1].index(cls)


def assert_same(store: FeatureStore, tokenizer: Any, family: Family, settings: FeatureSettings) -> None:
    """Every feature of the store equals the tokenizer's row, in order, and no row is missing."""
    number = 0
    for index, example in enumerate(store.examples):
        rows = tokenizer_rows(tokenizer, family, settings, example)
        for row_number, row in enumerate(rows):
            assert store.example_index[number] == index
            taken = store.take(np.array([number]))
            assert taken.input_ids.tolist() == row.ids
            assert store.lengths[number] == len(row.ids)
            if taken.token_type_ids is not None:
                # The tokenizers library (0.23) forgets its template's type ids in rows after the first.
                wanted = row.types if row_number == 0 else first_row_types(rows[0], row)
                assert taken.token_type_ids.tolist() == wanted
            assert taken.null_position.tolist() == [row.null]
            assert (taken.context_begin[0], taken.context_end[0]) == (
                row.context_begin,
                row.context_begin + len(row.offsets),
            )
            gold = row.golds[0] if row.golds else (row.null, row.null)
            assert (taken.start[0], taken.end[0]) == gold
            if settings.answers == "all":
                found = zip(taken.gold_starts.tolist(), taken.gold_ends.tolist(), strict=True)
                assert list(found) == row.golds
            assert_offsets(store, number, row, example.context)
            number += 1
    assert number == len(store)


def assert_offsets(store: FeatureStore, number: int, row: Row, context: str) -> None:
    """The characters of each context token are the tokenizer's."""
    places = np.arange(row.context_begin, row.context_begin + len(row.offsets))
    begin, end = store.character_spans(np.full(len(places), number), places, places)
    found = list(zip(begin.tolist(), end.tolist(), strict=True))
    assert found[1:] == row.offsets[1:]
    # The library (0.23) does not trim the blank before the first token of a later row of a tokenizer with
    # add_prefix_space: the same token has other offsets there than in the whole text.
    if found[0] != row.offsets[0]:
        assert row.first_token > 0
        assert all(not context[min(edge) : max(edge)].strip() for edge in zip(found[0], row.offsets[0], strict=True))


def first_row_types(first: Row, row: Row) -> list[int]:
    """The type ids of a later row by the pattern of the first: before, context and after it."""
    end = first.context_begin + len(first.offsets)
    context_type = first.types[first.context_begin]
    return first.types[: first.context_begin] + [context_type] * len(row.offsets) + first.types[end:]


def write_squad(path: Path, examples: list[Example]) -> str:
    """A SQuAD v1.1 file of these examples, one paragraph per run of questions with the same context."""
    paragraphs: list[dict[str, Any]] = []
    for one in examples:
        if not paragraphs or paragraphs[-1]["context"] != one.context:
            paragraphs.append({"context": one.context, "qas": []})
        answers = [{"text": answer.text, "answer_start": answer.start} for answer in one.answers]
        paragraphs[-1]["qas"].append({"id": one.example_id, "question": one.question, "answers": answers})
    path.write_text(
        json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}), encoding="utf-8"
    )
    return str(path)
