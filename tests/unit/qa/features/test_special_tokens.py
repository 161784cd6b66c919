"""Text is text: what spells a special token is encoded as its characters, whatever kind the tokenizer is."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.qa.features.encoding import Encoder, FastEncoder, Tokens, special_tokens
from qa_deepspeed.qa.features.in_memory import FeatureMaker
from qa_deepspeed.qa.features.slow_tokenizers import PythonEncoder
from tests.unit import small_tokenizers
from tests.unit.qa.features import test_slow_tokenizers
from tests.unit.qa.features.test_parity import SPELLED

KINDS = [*small_tokenizers.NAMES, *test_slow_tokenizers.NAMES]


def tokenizer_of(kind: str) -> Any:
    source = small_tokenizers if kind in small_tokenizers.NAMES else test_slow_tokenizers
    return source.tokenizer(kind)


def encoder_of(tokenizer: Any) -> Encoder:
    return FastEncoder(tokenizer) if tokenizer.is_fast else PythonEncoder(tokenizer)


def encoded(tokenizer: Any, text: str) -> Tokens:
    return encoder_of(tokenizer).encode([text], offsets=True)


def uncovered(tokens: Tokens, text: str) -> str:
    """The characters of the text, without blanks, that no token covers."""
    covered = np.zeros(len(text), bool)
    for begin, end in zip(tokens.begin, tokens.end, strict=True):
        covered[begin:end] = True
    return "".join(letter for letter, is_covered in zip(text, covered, strict=True) if not is_covered).replace(" ", "")


@pytest.mark.parametrize("pattern", ["{}", "the {} rises", "the{}rises", "{0}{0}", "Rhine{} ", "<{}>"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_special_token_is_found_in_a_text(kind: str, pattern: str) -> None:
    """But the unknown token, for what the vocabulary lacks; offsets cover every character."""
    tokenizer = tokenizer_of(kind)
    encoder = encoder_of(tokenizer)
    special = set(tokenizer.convert_tokens_to_ids(list(special_tokens(tokenizer)))) - {tokenizer.unk_token_id}
    assert special or kind in ("gpt2", "qwen2")  # whose only special token is the unknown one as well
    for token in special_tokens(tokenizer):
        text = pattern.format(token)
        tokens = encoder.encode([text], offsets=True)
        assert special.isdisjoint(tokens.ids.tolist()), text
        assert len(tokens.ids) > 1, text
        assert not uncovered(tokens, text), text


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_in_memory_sees_the_same_text(kind: str) -> None:
    """Each window of the answerer has the special tokens that stand around texts, and no others."""
    tokenizer = tokenizer_of(kind)
    source = small_tokenizers if kind in small_tokenizers.NAMES else test_slow_tokenizers
    maker = FeatureMaker(tokenizer, source.family(kind))
    special = set(tokenizer.convert_tokens_to_ids(list(special_tokens(tokenizer)))) - {tokenizer.unk_token_id}
    settings = FeatureSettings(max_seq_length=400, doc_stride=20, max_query_length=200)
    example = Example("0", SPELLED, SPELLED, (Answer("[SEP]", 10),))
    store = maker.features([example], settings)
    for row in range(len(store)):
        taken = store.take(np.array([row]))
        assert int(np.isin(taken.input_ids, list(special)).sum()) <= maker.template.special_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_is_what_the_tokenizer_makes_of_it(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for text in small_tokenizers.SENTENCES:
        wanted = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
        assert encoded(tokenizer, text).ids.tolist() == wanted


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "xlm-roberta", "prophetnet", "phobert", "byt5"])
def test_words_that_were_added_to_the_vocabulary_stay_whole(kind: str) -> None:
    """They are no special tokens, also in a text that spells some."""
    tokenizer = copy.deepcopy(tokenizer_of(kind))
    tokenizer.add_tokens([AddedToken("Rhinegold", normalized=False)])
    (added,) = tokenizer.convert_tokens_to_ids(["Rhinegold"])
    special = special_tokens(tokenizer)[0]
    for text in ("the Rhinegold rises", f"the Rhinegold {special} rises"):
        tokens = encoded(tokenizer, text)
        (place,) = np.flatnonzero(tokens.ids == added)
        assert text[tokens.begin[place] : tokens.end[place]].strip() == "Rhinegold"


# ---- models that look up whole words ----


def bare(model: Any, *special: str, **names: str) -> PreTrainedTokenizerFast:
    """A tokenizer that cuts at blanks, with these special tokens, and names for some."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def test_a_vocabulary_of_words() -> None:
    vocabulary = {"[UNK]": 0, "[SEP]": 1, "the": 2, "Rhine": 3}
    tokenizer = bare(models.WordLevel(vocabulary, unk_token="[UNK]"), "[UNK]", "[SEP]", unk_token="[UNK]")
    assert encoded(tokenizer, "the [SEP] Rhine [SEP]").ids.tolist() == [2, 0, 3, 0]


def test_merges_that_are_left_out_for_known_words() -> None:
    letters = ["<", "/", "s", ">", "a", "b"]
    vocabulary = {piece: number for number, piece in enumerate([*letters, "ab", "</s>"])}
    model = models.BPE(vocabulary, [("a", "b")], ignore_merges=True)
    tokenizer = bare(model, "</s>", eos_token="</s>")
    assert encoded(tokenizer, "ab </s>").ids.tolist() == [6, 0, 1, 2, 3]


def test_a_named_token_that_is_not_listed_as_special() -> None:
    letters = ["<", "/", "s", ">", "!"]
    vocabulary = {piece: number for number, piece in enumerate([*letters, "</s>"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.add_tokens([AddedToken("</s>", special=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=AddedToken("</s>", special=False))
    assert encoded(tokenizer, "s</s>s").ids.tolist() == [2, 0, 1, 2, 3, 2]


def test_a_special_token_of_one_character_keeps_its_id() -> None:
    """Where `!` pads, as in some models of images and text, a `!` of the text is the same token."""
    vocabulary = {"!": 0, "a": 1}
    tokenizer = bare(models.BPE(vocabulary, []), "!", pad_token="!")
    assert encoded(tokenizer, "a!").ids.tolist() == [1, 0]
