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
