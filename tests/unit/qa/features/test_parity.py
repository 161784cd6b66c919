"""Features equal, id for id and offset for offset, what each type of tokenizer itself gives for the pair.

Text is text: what spells a special token is no special token.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qa_deepspeed.qa.cache.prepare import prepare_features
from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.data.reading import DataSource
from qa_deepspeed.qa.features.build import FeatureSettings
from tests.unit import small_tokenizers
from tests.unit.reference_features import assert_same, token_ids, write_squad

WORDS = (
    *("the", "Rhine", "rises", "in", "Graubünden", "it's", "don't", "U.S.A.", "1,234.56", "€", "▁", "##ing", "-"),
    *("a" * 36, "😀", "👩\u200d👩\u200d👧", "🇩🇪", "e\u0301a\u0323\u0307", "é", "ﬁ", "½", "ſ", "İ", "ẞ"),
    *("한국", "\u1112\u1161\u11ab", "北京是中国", "東京", "القاهرة", "עיר", "Москва", "[MASK]", "</s>", "<unk>"),
    *("\u200d", "\ufeff", "\u00ad", "\x00", "\x07", "\u202e"),
)
SPELLED = "[CLS] the [SEP]Rhine</s><s> rises<pad> in [MASK] <mask>the <unk>[UNK] <sep><cls> <|endoftext|>, [PAD]"
"""Special tokens of all types of tokenizers, in every place of a text and of a word."""

BLANKS = (" ", " ", " ", "", "  ", "\n", "\t", "\u00a0", "\u3000", "\r\n")
any_text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30)
mixed_text = st.lists(
    st.tuples(st.sampled_from(WORDS) | any_text, st.sampled_from(BLANKS)), min_size=1, max_size=60
).map(lambda parts: "".join(word + blank for word, blank in parts))


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    """A few questions about one or two contexts, with up to two answers at any place, also of one character."""
    found = []
    for paragraph in range(draw(st.integers(1, 2))):
        context = draw(mixed_text)
        for number in range(draw(st.integers(1, 2))):
            answers = []
            for _ in range(draw(st.integers(1, 2))):
                start = draw(st.integers(0, len(context) - 1))
                end = draw(st.integers(start + 1, min(len(context), start + 40)))
                answers.append(Answer(context[start:end], start))
            question = draw(st.sampled_from(WORDS[:20]) | any_text)
            found.append(Example(f"{paragraph}-{number}", question, context, tuple(answers)))
    return found


def build(path: Path, name: str, rows: list[Example], shape: FeatureSettings, purpose: str = "evaluate"):
    source = DataSource((write_squad(path / "data.json", rows),), purpose, False)
    tokenizer, family = small_tokenizers.tokenizer(name), small_tokenizers.family(name)
    store = prepare_features(source, tokenizer, family, shape, path / "cache")
    return store, tokenizer, family


WIDE = 400
"""Tokens that every drawn question fits: byte-level tokenizers take up to 4 for a character."""


@pytest.mark.parametrize("name", small_tokenizers.NAMES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@example(
    rows=[Example("0", SPELLED, SPELLED, (Answer("[SEP]", 10), Answer("</s>", 20)))], room=9, stride=4, meaning="step",
    which="all",
)  # fmt: skip
@given(
    rows=examples(),
    room=st.integers(1, 40),
    stride=st.integers(1, 40),
    meaning=st.sampled_from(["step", "overlap"]),
    which=st.sampled_from(["first", "all"]),
)
def test_rows_equal_the_tokenizers_own(name, tmp_path_factory, rows, room, stride, meaning, which):
    tokenizer = small_tokenizers.reference(name)
    longest = max(len(token_ids(tokenizer, row.question)) for row in rows)
    shape = FeatureSettings(
        max_seq_length=max(longest, 1) + room + tokenizer.num_special_tokens_to_add(pair=True),
        doc_stride=min(stride, room if meaning == "step" else room - 1),
        doc_stride_is=meaning,
        max_query_length=max(longest, 1),
        answers=which,
    )
    try:
        store, _, family = build(tmp_path_factory.mktemp("parity"), name, rows, shape)
    except ValueError as error:
        assert "no usable question" in str(error)
        return
    assert_same(store, tokenizer, family, shape)
