"""Tokenizers without offsets: where their tokens stand in the text, and features built on that."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from qa_deepspeed.qa.cache.prepare import prepare_features
from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.data.reading import DataSource
from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.qa.features.families import family_of
from qa_deepspeed.qa.features.slow_tokenizers import PythonEncoder, align, fold
from qa_deepspeed.qa.features.windows import cut_windows
from tests.unit import small_tokenizers
from tests.unit.qa.features.test_parity import SPELLED, WORDS, examples, mixed_text
from tests.unit.reference_features import covering, located, write_squad

NAMES = ("prophetnet", "phobert", "byt5", "xlm", "flaubert")
MODEL_TYPES = {"prophetnet": "bert", "phobert": "roberta", "byt5": "t5"}


@cache
def _folder() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp(prefix="small_python_tokenizers_"))


@cache
def tokenizer(name: str) -> Any:
    if name in ("xlm", "flaubert") and importlib.util.find_spec("sacremoses") is None:
        pytest.skip("sacremoses is not installed: XLM and FlauBERT cannot tokenize without it")
    made: Any = transformers
    folder = _folder()
    words = sorted({word for sentence in small_tokenizers.SENTENCES for word in sentence.lower().split()})
    letters = sorted({letter for word in words for letter in word})
    pairs = sorted({(word[at], word[at + 1]) for word in words for at in range(len(word) - 2)})[::3]
    if name == "prophetnet":
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[X_SEP]", "[MASK]", *letters]
        (folder / "prophetnet.txt").write_text("\n".join([*pieces, *(f"##{one}" for one in letters)]), encoding="utf-8")
        return made.ProphetNetTokenizer(vocab_file=str(folder / "prophetnet.txt"))
    if name == "byt5":
        return made.ByT5Tokenizer()
    if name == "phobert":
        pieces = [f"{one}@@ 9" for one in letters] + [f"{one} 9" for one in letters]
        pieces += [f"{first}{second}@@ 9" for first, second in pairs]
        (folder / "phobert.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
        (folder / "phobert.codes").write_text("".join(f"{a} {b} 9\n" for a, b in pairs), encoding="utf-8")
        return made.PhobertTokenizer(str(folder / "phobert.txt"), str(folder / "phobert.codes"))
    pieces = ["<s>", "</s>", "<pad>", "<unk>", *(f"<special{n}>" for n in range(10)), *letters]
    pieces += [f"{one}</w>" for one in letters] + [f"{first}{second}" for first, second in pairs]
    (folder / "xlm.json").write_text(json.dumps({piece: n for n, piece in enumerate(dict.fromkeys(pieces))}))
    (folder / "xlm.merges").write_text("".join(f"{a} {b} 9\n" for a, b in pairs), encoding="utf-8")
    kind = made.XLMTokenizer if name == "xlm" else made.FlaubertTokenizer
    return kind(vocab_file=str(folder / "xlm.json"), merges_file=str(folder / "xlm.merges"))


def plain_tokens(name: str, text: str) -> list[str]:
    """What the tokenizer makes of a text in which nothing is a special token."""
    if name == "prophetnet":  # it keeps a special token that is a word; punctuation is a word of its own anyway
        text = re.sub(r"[\[\]]", r" \g<0> ", text)
    return list(tokenizer(name).tokenize(text, split_special_tokens=True))


# ---- alignment ----


@given(mixed_text)
def test_words_align_to_themselves(text: str) -> None:
    words = text.split()
    spans = align(text, words)
    assert len(spans) == len(words)
    for word, (begin, end) in zip(words, spans, strict=True):
        assert fold(text[begin:end])[0] == fold(word)[0]


@given(mixed_text, st.data())
def test_whatever_the_tokens_are_the_spans_are_in_order_and_inside(text: str, data: st.DataObject) -> None:
    surfaces = data.draw(st.lists(st.sampled_from([*WORDS, *text.split(), text[:3]]), max_size=20))
    spans = align(text, surfaces)
    assert len(spans) == len(surfaces)
    assert all(0 <= begin <= end <= len(text) for begin, end in spans)
    assert all(one[0] <= other[0] and one[1] <= other[1] for one, other in zip(spans, spans[1:], strict=False))


def test_replaced_lost_and_added_characters_shift_only_themselves() -> None:
    text = "He said “yes” on 12 km² of İstanbul... and co\u00adoperated."
    surfaces = ["he", "said", '"', "yes", '"', "on", "12", "km2", "of", "istanbul", "…", "and", "cooperated", "."]
    found = [text[begin:end] for begin, end in align(text, surfaces)]
    assert found == [
        "He",
        "said",
        "“",
        "yes",
        "”",
        "on",
        "12",
        "km²",
        "of",
        "İstanbul",
        "...",
        "and",
        "co\u00adoperated",
        ".",
    ]


def test_bytes_align_to_their_characters() -> None:
    text = "né 京😀a"
    encoder = PythonEncoder(tokenizer("byt5"))
    spans = encoder.spans(text, encoder.tokenize(text))
    wanted = [(at, at + 1) for at, letter in enumerate(text) for _ in letter.encode()]
    assert spans == wanted


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None)
@given(text=mixed_text)
def test_tokens_that_spell_the_text_stand_where_they_are_spelt(name: str, text: str) -> None:
    encoder = PythonEncoder(tokenizer(name))
    tokens = encoder.tokenize(text)
    spans = encoder.spans(text, tokens)
    assert len(spans) == len(tokens)
    assert all(0 <= begin <= end <= len(text) for begin, end in spans)
    surfaces = [encoder._surface(token) for token in tokens]
    if "".join(fold(surface)[0] for surface in surfaces) == fold(text)[0]:
        letters = [fold(text[begin:end])[0] for begin, end in spans]
        # A piece of a character that folds to several letters (½, ﬁ) covers the whole of it.
        assert all(fold(surface)[0] in letter for surface, letter in zip(surfaces, letters, strict=True))


# ---- features ----


def family(name: str) -> Any:
    return family_of(AutoConfig.for_model(MODEL_TYPES.get(name, name)), tokenizer(name))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, deadline=None)
@example(rows=[Example("0", "the", "</s> ", (Answer("</s>", 0),))], room=1, stride=1)
@example(rows=[Example("0", SPELLED, SPELLED, (Answer("[SEP]", 10),))], room=9, stride=4)
@given(rows=examples(), room=st.integers(1, 30), stride=st.integers(1, 30))
def test_rows_and_labels(name: str, tmp_path_factory: Any, rows: list[Example], room: int, stride: int) -> None:
    made = tokenizer(name)
    longest = max(1, *(len(plain_tokens(name, row.question)) for row in rows))
    shape = FeatureSettings(
        longest + room + made.num_special_tokens_to_add(pair=True), min(stride, room), "step", longest
    )
    path = tmp_path_factory.mktemp("python")
    source = DataSource((write_squad(path / "data.json", rows),), "evaluate", False)
    try:
        store = prepare_features(source, made, family(name), shape, path / "cache")
    except ValueError as error:
        assert "no usable question" in str(error)
        return
    number = 0
    encoder = PythonEncoder(made)
    for row in store.examples:
        question, context = (
            made.convert_tokens_to_ids(plain_tokens(name, text)) for text in (row.question, row.context)
        )
        spans = encoder.spans(row.context, plain_tokens(name, row.context))
        here = np.array([shape.max_seq_length - made.num_special_tokens_to_add(pair=True) - len(question)])
        _, begins, counts = cut_windows(np.array([len(context)]), here, np.array([shape.doc_stride]))
        for begin, count in zip(begins, counts, strict=True):
            taken = store.take(np.array([number]))
            window = context[begin : begin + count]
            assert taken.input_ids.tolist() == made.prepare_for_model(question, pair_ids=window)["input_ids"]
            at = int(taken.context_begin[0])
            assert taken.input_ids[at : taken.context_end[0]].tolist() == window
            gold = next((covering(spans, answer) for answer in located(row, shape)), None)
            if gold is not None and begin <= gold[0] and gold[1] < begin + count:
                assert (taken.start[0] - at + begin, taken.end[0] - at + begin) == gold
            else:
                assert taken.start[0] == taken.end[0] == taken.null_position[0]
            number += 1
    assert number == len(store)


def test_a_change_of_the_vocabulary_misses(tmp_path: Path) -> None:
    rows = [Example("a", "who", "The Rhine rises", (Answer("Rhine", 4),))]
    source = DataSource((write_squad(tmp_path / "data.json", rows),), "train", False)
    made = tokenizer("prophetnet")
    shape = FeatureSettings()
    assert prepare_features(source, made, family("prophetnet"), shape, tmp_path / "cache").built
    assert not prepare_features(source, made, family("prophetnet"), shape, tmp_path / "cache").built
    vocabulary = (_folder() / "prophetnet.txt").read_text(encoding="utf-8")
    (tmp_path / "other.txt").write_text(vocabulary + "\n##xyz", encoding="utf-8")
    other = transformers.ProphetNetTokenizer(vocab_file=str(tmp_path / "other.txt"))
    assert prepare_features(source, other, family("prophetnet"), shape, tmp_path / "cache").built
