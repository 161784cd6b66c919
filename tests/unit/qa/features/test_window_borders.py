"""Answers at the borders of windows: a window is labelled where it holds the whole answer, token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.features.build import FeatureSettings
from tests.unit import small_tokenizers
from tests.unit.qa.features.test_build import store_of

CONTEXT = "a " * 24
"""One token a word, at least with this tokenizer."""

ROOM, STEP = 8, 3


@pytest.mark.parametrize("which", ["keep", "drop"])
@pytest.mark.parametrize("answers", ["first", "all"])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_window_is_labelled_if_it_holds_the_whole_answer(
    tmp_path: Path, answers: str, width: int, which: str
) -> None:
    assert len(small_tokenizers.tokenizer("bert")("a " * 24, add_special_tokens=False)["input_ids"]) == 24
    asked = [Example(f"q{at}", "a", CONTEXT, (Answer(CONTEXT[2 * at :][: 2 * width - 1], 2 * at),)) for at in range(20)]
    settings = FeatureSettings(
        max_seq_length=ROOM + 4, doc_stride=STEP, max_query_length=1, answers=answers, windows_without_answer=which
    )
    store = store_of(tmp_path, asked, settings, "train")
    taken = store.take(np.arange(len(store)))
    begins, lengths = store.windows(np.arange(len(store)))
    found = set()
    for row in range(len(store)):
        example, begin, end = int(store.example_index[row]), int(begins[row]), int(begins[row] + lengths[row])
        holds = begin <= example and example + width <= end
        label = (int(taken.start[row]), int(taken.end[row]))
        if not holds:
            assert label == (taken.null_position[row],) * 2 and which == "keep", (example, begin, end)
            continue
        first = int(taken.context_begin[row]) + example - begin
        assert label == (first, first + width - 1)
        found.add((example, begin))
    starts = sorted(set(begins.tolist()))
    assert found == {(at, begin) for at in range(20) for begin in starts if begin <= at and at + width <= begin + ROOM}


def answer(at: int) -> Answer:
    """The answer of one token at this token of CONTEXT."""
    return Answer("a", 2 * at)


@pytest.mark.parametrize("answers", ["first", "all"])
def test_the_first_gold_answer_is_the_label_and_each_span_counts_once(tmp_path: Path, answers: str) -> None:
    asked = [Example("q", "a", CONTEXT, (answer(5), answer(2), answer(5), answer(9)))]
    settings = FeatureSettings(max_seq_length=28, doc_stride=1, max_query_length=1, answers=answers)
    taken = store_of(tmp_path, asked, settings, "train").take(np.arange(1))
    begin = int(taken.context_begin[0])
    assert (int(taken.start[0]), int(taken.end[0])) == (begin + 5, begin + 5)
    if answers == "all":
        assert taken.gold_starts.tolist() == taken.gold_ends.tolist() == [begin + 5, begin + 2, begin + 9]
        assert taken.gold_splits.tolist() == [0, 3]


def test_a_question_is_cut_to_max_query_length(tmp_path: Path) -> None:
    settings = FeatureSettings(max_seq_length=32, doc_stride=1, max_query_length=2)
    store = store_of(tmp_path, [Example("q", "a a a", CONTEXT, (answer(0),))], settings, "train")
    assert store.lengths.tolist() == [3 + 2 + 24] and store.counts["truncated_questions"] == 1


@pytest.mark.parametrize(("meaning", "step"), [("step", STEP), ("overlap", ROOM - STEP)])
def test_the_stride_is_a_step_or_an_overlap(tmp_path: Path, meaning: str, step: int) -> None:
    settings = FeatureSettings(max_seq_length=ROOM + 4, doc_stride=STEP, doc_stride_is=meaning, max_query_length=1)
    store = store_of(tmp_path, [Example("q", "a", CONTEXT, (answer(0),))], settings)
    begins, _ = store.windows(np.arange(len(store)))
    assert begins.tolist() == list(range(0, 24 - ROOM + step, step))


def test_a_position_behind_the_window_has_no_characters(tmp_path: Path) -> None:
    settings = FeatureSettings(max_seq_length=ROOM + 4, doc_stride=STEP, max_query_length=1)
    store = store_of(tmp_path, [Example("q", "a", CONTEXT, (answer(0),))], settings)
    taken = store.take(np.arange(1))
    last = int(taken.context_end[0]) - 1
    rows, starts = np.zeros(3, np.int64), np.array([last, last, last - ROOM])
    begin, end = store.character_spans(rows, starts, np.array([last, last + 1, last]))
    assert list(zip(begin.tolist(), end.tolist(), strict=True)) == [(2 * ROOM - 2, 2 * ROOM - 1), (0, 0), (0, 0)]
