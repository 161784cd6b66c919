"""Labels, windows and odd input; numbers found by looking at every token are the reference."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from transformers import AutoConfig, AutoTokenizer

from qa_deepspeed.qa.cache.prepare import prepare_features
from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.data.reading import DataSource, ReadReport, read_examples
from qa_deepspeed.qa.features import example_store
from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.qa.features.families import family_of
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.qa.features.windows import covering_tokens, cut_windows, ranges, splits_of
from qa_deepspeed.utils.errors import UserError
from tests.paths import DATA, MINILM, needs_real_data, needs_real_model
from tests.unit import small_tokenizers
from tests.unit.reference_features import assert_same, covering, write_squad

SHORT = FeatureSettings(max_seq_length=32, doc_stride=8, max_query_length=12)


def store_of(
    tmp_path: Path, rows: list[Example], settings: FeatureSettings, purpose: str = "evaluate", name: str = "bert"
) -> FeatureStore:
    source = DataSource((write_squad(tmp_path / "data.json", rows),), purpose, False)
    tokenizer, family = small_tokenizers.tokenizer(name), small_tokenizers.family(name)
    return prepare_features(source, tokenizer, family, settings, tmp_path / "cache")


# ---- array arithmetic ----


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 5)), max_size=20))
def test_ranges_are_the_numbers_one_after_another(rows: list[tuple[int, int]]) -> None:
    starts, counts = np.array(rows, dtype=np.int64).reshape(-1, 2).T
    wanted = [number for start, count in rows for number in range(start, start + count)]
    assert ranges(starts, counts).tolist() == wanted
    assert splits_of(counts).tolist() == [int(counts[:end].sum()) for end in range(len(rows) + 1)]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12), st.integers(1, 12)), max_size=8))
def test_windows_start_every_step_and_reach_the_end(rows: list[tuple[int, int, int]]) -> None:
    rows = [(length, room, min(step, room)) for length, room, step in rows]
    lengths, rooms, steps = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    wanted = []
    for number, (length, room, step) in enumerate(rows):
        begin = 0
        while begin == 0 and length or begin < length and begin + room - step < length:
            wanted.append((number, begin, min(room, length - begin)))
            begin += step
    assert list(zip(*(part.tolist() for part in cut_windows(lengths, rooms, steps)), strict=True)) == wanted


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), max_size=12), min_size=1, max_size=4), st.data()
)
def test_covering_tokens_are_the_first_and_last_that_overlap(
    texts: list[list[tuple[int, int]]], data: st.DataObject
) -> None:
    """Offsets of any kind: with gaps, of no width, shared by several tokens, going back."""
    offsets = [[(begin, begin + width) for begin, width in text] for text in texts]
    spans = data.draw(
        st.lists(st.tuples(st.integers(0, len(texts) - 1), st.integers(0, 14), st.integers(1, 6)), max_size=8)
    )
    flat = np.array([pair for text in offsets for pair in text], dtype=np.int32).reshape(-1, 2)
    text, begin, width = np.array(spans, dtype=np.int64).reshape(-1, 3).T
    splits = splits_of(np.array([len(one) for one in offsets]))
    first, last = covering_tokens(flat[:, 0], flat[:, 1], splits, text, begin, begin + width)
    for number, (which, start, size) in enumerate(spans):
        ordered = all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(offsets[which]))
        found = covering(offsets[which], (start, start + size))
        if ordered:
            assert (first[number], last[number]) == (found or (0, -1))
        elif found is not None:
            assert first[number] <= found[0] and last[number] >= found[1]


# ---- labels ----


def test_several_windows_hold_the_answer_and_each_is_labelled(tmp_path: Path) -> None:
    context = " ".join(f"w{number}" for number in range(30))
    start = context.index("w9 ")
    store = store_of(tmp_path, [Example("a", "what", context, (Answer("w9", start),))], SHORT, "train")
    taken = store.take(np.arange(len(store)))
    labelled = np.flatnonzero(taken.start != taken.null_position)
    assert len(labelled) >= 2
    begin, end = store.character_spans(labelled, taken.start[labelled], taken.end[labelled])
    assert {context[a:b] for a, b in zip(begin, end, strict=True)} == {"w9"}
    assert store.counts["windows_without_answer"] == len(store) - len(labelled) > 0
    assert store.counts["answers_in_no_window"] == 0


@pytest.mark.parametrize("which", ["keep", "drop", "sample"])
def test_windows_without_the_answer_are_kept_dropped_or_sampled(tmp_path: Path, which: str) -> None:
    context = " ".join(f"w{number}" for number in range(40))
    rows = [Example(f"a{n}", "what", context, (Answer("w9", context.index("w9 ")),)) for n in range(20)]
    everything = store_of(tmp_path, rows, SHORT, "train")
    without = everything.counts["windows_without_answer"] // 20
    settings = FeatureSettings(max_seq_length=32, doc_stride=8, max_query_length=12, windows_without_answer=which)
    store = store_of(tmp_path, rows, settings, "train")
    taken = store.take(np.arange(len(store)))
    missing = np.bincount(store.example_index[taken.start == taken.null_position], minlength=20)
    assert missing.tolist() == [{"keep": without, "drop": 0, "sample": 1}[which]] * 20
    assert store.counts["windows_dropped"] == len(everything) - len(store)
    if which == "sample":
        drawn = taken.input_ids[taken.row_splits[:-1] + taken.context_begin][taken.start == taken.null_position]
        assert len(set(drawn.tolist())) > 1
    # Evaluation needs every window, whatever training does with them.
    assert len(store_of(tmp_path, rows, settings)) == len(everything)


def test_an_answer_wider_than_any_window_is_counted(tmp_path: Path) -> None:
    context = " ".join(f"w{number}" for number in range(40))
    store = store_of(tmp_path, [Example("a", "what", context, (Answer(context[:150], 0),))], SHORT, "train")
    taken = store.take(np.arange(len(store)))
    assert (taken.start == taken.null_position).all()
    assert store.counts["answers_in_no_window"] == 1


# ---- odd input ----


def test_a_blank_context_in_the_middle_shifts_nothing(tmp_path: Path) -> None:
    rows = [
        Example("a", "who", "The Rhine rises", (Answer("Rhine", 4),)),
        Example("blank", "who", "", (Answer("x", -1),)),
        Example("no token", "who", "\u200b\u0007", (Answer("x", -1),)),
        Example("b", "when", "in the Swiss canton", (Answer("Swiss", 7),)),
    ]
    store = store_of(tmp_path, rows, SHORT)
    assert store.examples.ids == ["a", "blank", "no token", "b"]
    assert store.example_index.tolist() == [0, 3]
    assert store.counts["examples_without_tokens"] == 2
    taken = store.take(np.array([1]))
    (begin,), (end,) = store.character_spans([1], taken.start, taken.end)
    assert store.examples[3].context[begin:end] == "Swiss"
    with pytest.raises(IndexError):
        store.take(np.array([2]))
    with pytest.raises(IndexError):
        store.examples[4]
    assert store.examples[-1].example_id == "b"


@pytest.mark.parametrize("name", ["bert", "roberta", "xlnet", "t5", "llama"])
def test_a_question_longer_than_max_seq_length_is_cut_and_counted(tmp_path: Path, name: str) -> None:
    question = "what " * 200
    store = store_of(tmp_path, [Example("a", question, "The Rhine rises " * 9, ())], SHORT, name=name)
    tokenizer, family = small_tokenizers.tokenizer(name), small_tokenizers.family(name)
    ids = tokenizer(question, add_special_tokens=False)["input_ids"][: SHORT.max_query_length]
    for row in range(len(store)):
        taken = store.take(np.array([row]))
        assert len(taken.input_ids) <= SHORT.max_seq_length
        found = taken.input_ids.tolist()
        assert any(found[at : at + len(ids)] == ids for at in range(len(found)))
    assert store.lengths.max() == SHORT.max_seq_length
    assert store.counts["truncated_questions"] == 1
    assert family.context_first == (name == "xlnet")


def test_one_context_of_70000_characters(tmp_path: Path) -> None:
    context = " ".join(small_tokenizers.SENTENCES * 150)[:70_000]
    answers = (Answer(context[-7:], len(context) - 7), Answer(context[0], 0))
    settings = FeatureSettings(max_seq_length=128, doc_stride=32, max_query_length=16, answers="all")
    for name in ("bert", "roberta", "xlm-roberta", "xlnet"):
        store = store_of(tmp_path, [Example("a", "what is it?", context, answers)], settings, name=name)
        assert_same(store, small_tokenizers.tokenizer(name), small_tokenizers.family(name), settings)


# ---- settings ----


@pytest.mark.parametrize("meaning", ["step", "overlap"])
def test_a_stride_that_would_lose_tokens_is_refused_with_the_largest_that_fits(tmp_path: Path, meaning: str) -> None:
    rows = [Example("a", "who", "The Rhine rises", ())]
    largest = 32 - 3 - 12 if meaning == "step" else 32 - 3 - 12 - 1

    def settings(stride: int) -> FeatureSettings:
        return FeatureSettings(max_seq_length=32, doc_stride=stride, doc_stride_is=meaning, max_query_length=12)

    with pytest.raises(UserError, match=f"largest value that fits is {largest}"):
        store_of(tmp_path, rows, settings(largest + 1))
    assert len(store_of(tmp_path, rows, settings(largest))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_seq_length": 15}, "leaves no room"),
        ({"max_query_length": 0}, "at least 1"),
        ({"doc_stride": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, change: dict[str, int], message: str) -> None:
    settings = FeatureSettings(**{"max_seq_length": 32, "doc_stride": 1, "max_query_length": 12, **change})
    with pytest.raises(UserError, match=message):
        store_of(tmp_path, [Example("a", "who", "The Rhine rises", ())], settings)


# ---- taking rows ----


@pytest.fixture(scope="module")
def several_shards(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    context = " ".join(f"w{number}" for number in range(100)) + "."
    rows = [
        Example(f"q{n}", "what " * (n % 5 + 1), f"{n} " * 40 + context, (Answer("w4", 40 * len(f"{n} ") + 12),))
        for n in range(60)
    ]
    settings = FeatureSettings(max_seq_length=100, doc_stride=50, max_query_length=12, answers="all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example_store, "SMALL_SHARD", 16)
        return store_of(tmp_path_factory.mktemp("shards"), rows, settings)


@settings(deadline=None)
@given(data=st.data())
def test_rows_are_taken_in_any_order_and_across_shards(several_shards: FeatureStore, data: st.DataObject) -> None:
    store = several_shards
    rows = data.draw(arrays.arrays(np.int64, st.integers(0, 12), elements=st.integers(0, len(store) - 1)))
    taken = store.take(rows)
    one_by_one = [store.take(np.array([row])) for row in rows]
    assert taken.input_ids.tolist() == [token for one in one_by_one for token in one.input_ids.tolist()]
    assert taken.token_type_ids.tolist() == [kind for one in one_by_one for kind in one.token_type_ids.tolist()]
    assert np.diff(taken.row_splits).tolist() == store.lengths[rows].tolist()
    for column in ("start", "end", "null_position", "context_begin", "context_end", "feature_id"):
        assert getattr(taken, column).tolist() == [getattr(one, column)[0] for one in one_by_one]
    assert taken.gold_starts.tolist() == [gold for one in one_by_one for gold in one.gold_starts.tolist()]
    assert np.diff(taken.gold_splits).tolist() == [len(one.gold_starts) for one in one_by_one]
    spans = store.character_spans(rows, taken.start, taken.end)
    for number, one in enumerate(one_by_one):
        alone = store.character_spans(rows[number : number + 1], one.start, one.end)
        assert (spans[0][number], spans[1][number]) == (alone[0][0], alone[1][0])


# ---- real data ----


@needs_real_data
@needs_real_model
@pytest.mark.real
@pytest.mark.parametrize("file", ["en-v1-dev.json", "en-v2-dev.json", "ja-v1-sample.json"])
def test_real_files_equal_the_tokenizers_rows_and_labels_decode_to_the_answers(tmp_path: Path, file: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    family = family_of(AutoConfig.from_pretrained(MINILM), tokenizer)
    settings = FeatureSettings(max_seq_length=256, doc_stride=64, max_query_length=128)
    source = DataSource((str(DATA / file),), "evaluate", "v2" in file, max_examples=300)
    store = prepare_features(source, tokenizer, family, settings, tmp_path)
    assert list(store.examples) == list(read_examples(source, ReadReport()))
    assert_same(store, tokenizer, family, settings)
    taken = store.take(np.arange(len(store)))
    labelled = np.flatnonzero(taken.start != taken.null_position)
    begin, end = store.character_spans(labelled, taken.start[labelled], taken.end[labelled])
    inside = 0
    for row, first, last in zip(labelled, begin, end, strict=True):
        example = store.examples[int(store.example_index[row])]
        answer = example.answers[0]
        assert first <= answer.start and answer.start + len(answer.text) <= last
        inside += example.context[first:last] == answer.text
    assert inside > (0.99 if file.startswith("en") else 0.5) * len(labelled) > 0
