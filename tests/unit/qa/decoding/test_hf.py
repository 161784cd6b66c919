"""`decode_like_transformers` against a plain loop over the rules of Transformers' example, and against `exact`."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.decoding import full_logits
from qa_deepspeed.qa.decoding.full_logits import FullLogits
from qa_deepspeed.qa.decoding.hf import decode_like_transformers
from qa_deepspeed.qa.decoding.predictions import NO_SPAN_NULL_ODDS, DecodeSettings


class RowStore:
    """A feature store in memory. `offsets[row]` has a (begin, end) for each context token and None for the others."""

    def __init__(self, contexts, example_index, offsets):
        self.examples = [Example(f"q{i}", "?", context) for i, context in enumerate(contexts)]
        self.example_index = np.array(example_index, np.int64)
        self.offsets = offsets

    def take(self, rows):
        inside = [[i for i, offset in enumerate(self.offsets[row]) if offset] for row in rows]
        return SimpleNamespace(
            context_begin=np.array([tokens[0] for tokens in inside], np.int32),
            context_end=np.array([tokens[-1] + 1 for tokens in inside], np.int32),
        )

    def character_spans(self, rows, starts, ends):
        pairs = [(self.offsets[r][s][0], self.offsets[r][e][1]) for r, s, e in zip(rows, starts, ends, strict=True)]
        return tuple(np.array(pairs, np.int64).reshape(-1, 2).T)


def plain_loop(start_logits, end_logits, store, how):
    """The answer, the n-best texts, the null odds and both logits of each n-best entry, pair by pair."""
    for index, example in enumerate(store.examples):
        found, null = [], None
        for row in np.flatnonzero(store.example_index == index):
            start, end, offsets = start_logits[row], end_logits[row], store.offsets[row]
            if null is None or start[0] + end[0] < null[0]:
                null = (start[0] + end[0], start[0], end[0], 0, 0)
            for s in np.argsort(start)[::-1][: how.n_best_size]:
                for e in np.argsort(end)[::-1][: how.n_best_size]:
                    in_context = s < len(offsets) and e < len(offsets) and offsets[s] and offsets[e]
                    if in_context and s <= e < s + how.max_answer_length:
                        found.append((start[s] + end[e], start[s], end[e], offsets[s][0], offsets[e][1]))
        if how.version_2_with_negative and null:
            found.append(null)
        found = sorted(found, key=lambda one: one[0], reverse=True)[: how.n_best_size]
        if how.version_2_with_negative and null and not any(one[3:] == (0, 0) for one in found):
            found.append(null)
        texts = [example.context[one[3] : one[4]] for one in found]
        if texts in ([], [""]):
            texts.insert(0, "empty")
            found.insert(0, (np.float32(0), np.float32(0), np.float32(0), 0, 0))
        logits = [(float(one[1]), float(one[2])) for one in found]
        if not how.version_2_with_negative:
            yield texts[0], texts, None, logits
            continue
        best = next((i for i, text in enumerate(texts) if text), None)
        if null is None or best is None:
            yield "", texts, NO_SPAN_NULL_ODDS, logits
            continue
        odds = null[0] - found[best][1] - found[best][2]
        yield ("" if odds > how.null_score_diff_threshold else texts[best]), texts, float(odds), logits


def assert_same(logits, store, how):
    fast = list(decode_like_transformers(FullLogits(np.arange(len(store.offsets)), *logits), store, how))
    slow = list(plain_loop(*logits, store, how))
    assert [p.example_id for p in fast] == [example.example_id for example in store.examples]
    found = [(p.text, [entry[0] for entry in p.nbest], p.null_odds, [entry[2:4] for entry in p.nbest]) for p in fast]
    assert found == slow
    for prediction in fast:
        assert sum(probability for _, probability, *_ in prediction.nbest) == pytest.approx(1, abs=1e-5)
    return fast


def random_problem(generator, questions, length, distinct=None):
    """Contexts of words, windows of half a context, random logits; `distinct` limits their number, for many ties."""
    contexts, example_index, offsets = [], [], []
    for index in range(questions):
        words = ["w" * int(n) for n in generator.integers(1, 5, generator.integers(0, length))]
        contexts.append(" ".join(words))
        ends = np.cumsum([len(word) + 1 for word in words])
        tokens = [(int(end) - 1 - len(word), int(end) - 1) for word, end in zip(words, ends, strict=True)]
        for begin in range(0, len(tokens), max(1, length // 4)):
            question_tokens = int(generator.integers(1, 4))
            offsets.append([None] * (question_tokens + 1) + tokens[begin : begin + length // 2] + [None])
            example_index.append(index)
    width = max(map(len, offsets), default=1) + 2  # padding, whose logits take part in the ranking
    logits = generator.normal(0, 3, (2, len(offsets), width)).astype(np.float32)
    if distinct:
        logits = np.round(logits * distinct) / np.float32(distinct)
    return RowStore(contexts, example_index, offsets), logits


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(2, 60),
    st.sampled_from([None, 1, 4]),
    st.integers(1, 25),
    st.integers(1, 30),
    st.booleans(),
    st.sampled_from([0.0, -3.0, 2.0]),
)
def test_decoder_equals_plain_loop(seed, questions, length, distinct, n_best_size, longest, v2, threshold):
    store, logits = random_problem(np.random.default_rng(seed), questions, length, distinct)
    assert_same(logits, store, DecodeSettings(n_best_size, longest, v2, threshold))


@pytest.mark.parametrize("v2", [False, True])
def test_chunk_size_changes_nothing(monkeypatch, v2):
    store, logits = random_problem(np.random.default_rng(1), 40, 40)
    whole = [one.nbest for one in assert_same(logits, store, DecodeSettings(version_2_with_negative=v2))]
    for rows in (1, 2, 7):
        monkeypatch.setattr(full_logits, "ROWS_AT_ONCE", rows)
        again = assert_same(logits, store, DecodeSettings(version_2_with_negative=v2))
        assert [one.nbest for one in again] == whole


def test_question_without_a_span_is_answered_empty():
    store = RowStore(["ab"], [0], [[None, (0, 2), None]])
    logits = np.array([[[9.0, 0.0, 8.0]], [[9.0, 0.0, 8.0]]], np.float32)
    (prediction,) = assert_same(logits, store, DecodeSettings(n_best_size=2))
    assert prediction.text == "empty"
    (prediction,) = assert_same(logits, store, DecodeSettings(n_best_size=2, version_2_with_negative=True))
    assert (prediction.text, prediction.null_odds) == ("", 18.0)
