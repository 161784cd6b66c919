"""The exact decoder against a slow reference, on random candidates and edge cases."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.decoding.exact import NO_SPAN_NULL_ODDS as NO_SPAN
from qa_deepspeed.qa.decoding.exact import Candidates, DecodeSettings, decode, write_predictions
from qa_deepspeed.qa.decoding.predictions import NBEST_FIELDS
from qa_deepspeed.utils.errors import UserError


class Store:
    """A feature store in memory: `offsets[row]` lists the (begin, end) characters of each token of that row."""

    def __init__(self, contexts, example_index, offsets):
        self.examples = [Example(f"q{i}", "?", context) for i, context in enumerate(contexts)]
        self.example_index = np.array(example_index, np.int64)
        self.offsets = offsets

    def character_spans(self, rows, start_positions, end_positions):
        spans = [
            (self.offsets[row][start][0], self.offsets[row][end][1])
            for row, start, end in zip(rows, start_positions, end_positions, strict=True)
        ]
        return tuple(np.array(spans, np.int64).reshape(-1, 2).T)


def candidates_of(rows, width):
    """`rows[feature]` is a list of (start, end, start_logit, end_logit), which is sorted best first here, and the start
    and the end logit of the null position.
    """
    count = len(rows)
    start = np.full((count, width), -1, np.int32)
    end = start.copy()
    start_logit = np.zeros((count, width), np.float32)
    end_logit = start_logit.copy()
    for i, (spans, _) in enumerate(rows):
        spans = sorted(spans, key=lambda s: (-(np.float32(s[2]) + np.float32(s[3])), s[0], s[1]))[:width]
        for j, values in enumerate(spans):
            start[i, j], end[i, j], start_logit[i, j], end_logit[i, j] = values
    nulls = np.array([null for _, null in rows], np.float32).reshape(-1, 2)
    return Candidates(np.arange(count), start, end, start_logit, end_logit, *nulls.T)


def decode_slowly(candidates, store, how):
    for index, example in enumerate(store.examples):
        found, null, null_logits = [], np.inf, (0.0, 0.0)
        for row in np.flatnonzero(store.example_index == index):
            logits = candidates.null_start_logit[row], candidates.null_end_logit[row]
            if logits[0] + logits[1] < null:
                null, null_logits = logits[0] + logits[1], tuple(map(float, logits))
            for j in range(candidates.start.shape[1]):
                if candidates.start[row, j] < 0:
                    continue
                begin = store.offsets[row][candidates.start[row, j]][0]
                end = store.offsets[row][candidates.end[row, j]][1]
                score = candidates.start_logit[row, j] + candidates.end_logit[row, j]
                found.append((-score, begin, end, row, j))
        nbest, seen = [], set()
        for negative, begin, end, row, j in sorted(found):
            text = example.context[begin:end].strip()
            begin += len(example.context[begin:end]) - len(example.context[begin:end].lstrip())
            identity = text if how.merge_duplicate_texts else (begin, begin + len(text))
            if not text or identity in seen or len(nbest) == how.n_best_size:
                continue
            seen.add(identity)
            logits = float(candidates.start_logit[row, j]), float(candidates.end_logit[row, j])
            nbest.append((-float(negative), text, *logits, begin))
        if not nbest:
            v2 = how.version_2_with_negative
            yield example.example_id, "", [("", 1.0, *(null_logits if v2 else (0.0, 0.0)), -1)], NO_SPAN if v2 else None
            continue
        text, odds = nbest[0][1], None
        if how.version_2_with_negative:
            odds = float(null) - nbest[0][0]
            if odds > how.null_score_diff_threshold:
                text = ""
            better = sum(entry[0] >= null for entry in nbest)
            nbest.insert(better, (float(null), "", *null_logits, -1))
        weights = [math.exp(entry[0] - max(nbest)[0]) for entry in nbest]
        probabilities = [weight / sum(weights) for weight in weights]
        yield example.example_id, text, [(e[1], p, *e[2:]) for e, p in zip(nbest, probabilities, strict=True)], odds


def plain(predictions):
    """Predictions in a form that == compares: arrays as entries."""
    return [(one.example_id, one.text, one.nbest, one.null_odds) for one in predictions]


def assert_same(candidates, store, how, rows_per_chunk=4096):
    fast = list(decode(candidates, store, how, rows_per_chunk))
    slow = list(decode_slowly(candidates, store, how))
    assert [p.example_id for p in fast] == [s[0] for s in slow]
    for prediction, (_, text, nbest, odds) in zip(fast, slow, strict=True):
        assert prediction.text == text
        assert prediction.null_odds == odds
        assert [(e[0], *e[2:]) for e in prediction.nbest] == [(e[0], *e[2:]) for e in nbest]
        assert [probability for _, probability, *_ in prediction.nbest] == pytest.approx(
            [e[1] for e in nbest], rel=1e-6, abs=1e-40
        )
    return fast


@st.composite
def problems(draw):
    """Contexts with blanks and zero-width tokens, overlapping windows, few distinct logits for many ties."""
    contexts = draw(st.lists(st.text(alphabet="ab \n", max_size=12), min_size=1, max_size=5))
    example_index, offsets, rows = [], [], []
    logit = st.sampled_from([-1.5, 0.0, 0.25, 1e-4, 3.0, 1e7]) | st.floats(-20, 20, width=32)
    for index, context in enumerate(contexts):
        cuts = sorted(draw(st.lists(st.integers(0, len(context)), min_size=2, max_size=8)))
        tokens = list(zip(cuts[:-1], cuts[1:], strict=True))
        for _ in range(draw(st.integers(0, 3)) if context else 0):
            begin = draw(st.integers(0, len(tokens) - 1))
            window = tokens[begin:]
            pairs = [(s, e) for s in range(len(window)) for e in range(s, min(len(window), s + 4))]
            chosen = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=8))
            rows.append(([(s, e, draw(logit), draw(logit)) for s, e in chosen], (draw(logit), draw(logit))))
            example_index.append(index)
            offsets.append(window)
    return Store(contexts, example_index, offsets), rows


@settings(max_examples=400, deadline=None)
@given(
    problems(),
    st.integers(1, 9),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, -2.0, 1.5]),
    st.sampled_from([1, 2, 3, 4096]),
)
def test_decoder_equals_slow_reference(problem, width, n_best_size, v2, merge, threshold, rows_per_chunk):
    store, rows = problem
    how = DecodeSettings(n_best_size, 4, v2, threshold, merge)
    assert_same(candidates_of(rows, width), store, how, rows_per_chunk)


def words(context):
    offsets, position = [], 0
    for word in context.split(" "):
        offsets.append((position, position + len(word)))
        position += len(word) + 1
    return offsets


def test_decoder_equals_reference_over_many_chunks():
    generator = np.random.default_rng(3)
    contexts = [" ".join("abcdefgh"[k] * 3 for k in generator.integers(0, 8, 30)) for _ in range(60)]
    example_index, offsets, rows = [], [], []
    for index, context in enumerate(contexts):
        for begin in range(0, 30, 10)[: generator.integers(0, 4)]:
            tokens = words(context)[begin : begin + 20]
            spans = [(s, e) for s in range(len(tokens)) for e in range(s, min(s + 5, len(tokens)))]
            logits = generator.normal(0, 3, (2, len(tokens))).astype(np.float32)
            rows.append(([(s, e, logits[0, s], logits[1, e]) for s, e in spans], generator.normal(2, 2, 2)))
            example_index.append(index)
            offsets.append(tokens)
    store = Store(contexts, example_index, offsets)
    for v2 in (False, True):
        how = DecodeSettings(n_best_size=20, max_answer_length=5, version_2_with_negative=v2)
        predictions = assert_same(candidates_of(rows, 20), store, how)
        assert plain(assert_same(candidates_of(rows, 20), store, how, rows_per_chunk=7)) == plain(predictions)
    assert 0 < sum(p.text == "" for p in predictions) < len(predictions)


def test_texts_are_read_by_range_where_possible():
    class Texts:
        def __init__(self, examples):
            self.examples = examples

        def __len__(self):
            return len(self.examples)

        def __iter__(self):
            raise AssertionError("whole examples are slow to make")

        def ids_and_contexts(self, begin, end):
            chunk = self.examples[begin:end]
            return [example.example_id for example in chunk], [example.context for example in chunk]

    store = Store(["ab cd", "ef", "gh ij"], [0, 0, 1, 2], [words("ab cd"), words("ab cd"), words("ef"), words("gh ij")])
    candidates = candidates_of([([(0, 0, i, 1)], (0, 0)) for i in range(4)], 3)
    expected = plain(decode(candidates, store, DecodeSettings(), 2))
    store.examples = Texts(store.examples)
    assert plain(decode(candidates, store, DecodeSettings(), 2)) == expected


def one_question(spans_by_window, null_starts, context="ab cd ef", **how):
    offsets = [words(context)] * len(spans_by_window)
    store = Store([context], [0] * len(offsets), offsets)
    nulls = [(start, 0) for start in null_starts]
    candidates = candidates_of(list(zip(spans_by_window, nulls, strict=True)), 5)
    return next(decode(candidates, store, replace(DecodeSettings(), **how)))


def test_same_characters_in_two_windows_count_once():
    prediction = one_question([[(0, 0, 1, 1)], [(0, 0, 2, 2), (1, 1, 0, 0)]], [0, 0])
    assert [(text, logit) for text, _, logit, *_ in prediction.nbest] == [("ab", 2.0), ("cd", 0.0)]


def test_ties_are_broken_by_start_then_end():
    prediction = one_question([[(1, 2, 1, 1), (2, 2, 0, 2)], [(1, 1, 2, 0), (0, 1, 1, 1)]], [0, 0])
    assert [text for text, *_ in prediction.nbest] == ["ab cd", "cd", "cd ef", "ef"]


def test_null_score_is_the_windows_minimum_and_must_exceed_the_threshold():
    windows, nulls = [[(0, 0, 1, 1)], [(1, 1, 0, 0)]], [7, 3]
    v2 = {"version_2_with_negative": True}
    assert one_question(windows, nulls, **v2).null_odds == 1.0
    assert one_question(windows, nulls, **v2).text == ""
    assert one_question(windows, nulls, **v2, null_score_diff_threshold=1.0).text == "ab"
    assert one_question(windows, nulls, **v2).best_span_text == "ab"
    assert one_question(windows, nulls).text == "ab"


def test_null_entry_has_both_logits_of_the_first_window_with_the_lowest_sum():
    offsets = [words("ab cd")] * 4
    store = Store(["ab cd"], [0] * 4, offsets)
    nulls = [(3.5, 2.0), (-1.5, 4.0), (0.5, 2.0), (8.0, -5.0)]
    how = DecodeSettings(version_2_with_negative=True)
    for spans in ([(0, 0, 1, 1)], []):
        prediction = next(decode(candidates_of([(spans, null) for null in nulls], 5), store, how))
        assert [entry[2:] for entry in prediction.nbest if not entry[0]] == [(-1.5, 4.0, -1)]
    assert prediction.null_odds == NO_SPAN


def test_nonfinite_logits_are_a_user_error():
    with pytest.raises(UserError, match="question q0 are not finite"):
        one_question([[(0, 0, float("nan"), 1)]], [0])
    with pytest.raises(UserError, match="question q0 are not finite"):
        one_question([[(0, 0, 1, 1)]], [float("inf")], version_2_with_negative=True)


def test_invalid_candidate_span_is_an_assertion():
    with pytest.raises(AssertionError, match="invalid spans"):
        one_question([[(0, 2, 1, 1)]], [0], max_answer_length=2)


@pytest.mark.parametrize("v2", [False, True])
def test_files_round_trip_and_are_deterministic(tmp_path, v2):
    generator = np.random.default_rng(5)
    contexts = ['Zürich "is" \U0001f600 a\tcity\\', "", "one two three four"]
    offsets = [words(contexts[0]), words(contexts[2]), words(contexts[2])]
    rows = []
    for tokens in offsets:
        logits = generator.normal(0, 5, (2, len(tokens))).astype(np.float32)
        spans = [(s, e, logits[0, s], logits[1, e]) for s in range(len(tokens)) for e in range(s, len(tokens))]
        rows.append((spans, generator.normal(0, 1, 2)))
    store, how = Store(contexts, [0, 2, 2], offsets), DecodeSettings(version_2_with_negative=v2)
    predictions = list(decode(candidates_of(rows, 20), store, how))
    for name in ("first", "second"):
        write_predictions(iter(predictions), tmp_path / name, how)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(["predictions.json", "nbest_predictions.json"] + ["null_odds.json"] * v2)
    read = {}
    for name in names:
        content = (tmp_path / "first" / name).read_bytes()
        assert content == (tmp_path / "second" / name).read_bytes()
        read[name] = json.loads(content)
    assert read["predictions.json"] == {p.example_id: p.text for p in predictions}
    if v2:
        assert read["null_odds.json"] == {p.example_id: p.null_odds for p in predictions}
    for prediction in predictions:
        for entry, entry_in_memory in zip(
            read["nbest_predictions.json"][prediction.example_id], prediction.nbest, strict=True
        ):
            assert list(entry) == list(NBEST_FIELDS)
            for key, value in zip(NBEST_FIELDS, entry_in_memory, strict=True):
                assert entry[key] == value if isinstance(value, str) else np.float32(entry[key]) == np.float32(value)


def test_failed_write_leaves_the_old_files(tmp_path):
    how = DecodeSettings()
    store = Store(["ab"], [0], [[(0, 2)]])
    candidates = candidates_of([([(0, 0, 1, 1)], (0, 0))], 1)
    write_predictions(decode(candidates, store, how), tmp_path, how)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken():
        yield from decode(candidates, store, how)
        raise RuntimeError("disk pulled")

    with pytest.raises(RuntimeError, match="disk pulled"):
        write_predictions(broken(), tmp_path, how)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_v1_run_removes_null_odds_of_earlier_v2_run(tmp_path):
    (tmp_path / "null_odds.json").write_text("{}")
    write_predictions([], tmp_path, DecodeSettings())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nbest_predictions.json", "predictions.json"]
    assert json.loads((tmp_path / "predictions.json").read_text()) == {}


def test_of_equal_scores_the_one_that_begins_first_comes_first():
    """Also where it ends later, and in whichever of the windows it stands."""
    store = Store(["a b c d e"], [0, 0], [[(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]] * 2)
    rows = [([(2, 2, 1.0, 1.0)], (0.0, 0.0)), ([(1, 3, 1.0, 1.0)], (0.0, 0.0))]
    (found,) = decode(candidates_of(rows, 2), store, DecodeSettings(n_best_size=2))
    assert [text for text, *_ in found.nbest] == ["b c d", "c"]
