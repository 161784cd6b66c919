"""What differs by architecture, for every family of the table and some that are not in it."""

from __future__ import annotations

import pytest
import transformers
from transformers import AutoConfig

from qa_deepspeed.qa.features.encoding import FastEncoder
from qa_deepspeed.qa.features.families import FAMILIES, family_of, model_columns
from qa_deepspeed.qa.features.template import check_template, find_template
from qa_deepspeed.utils.errors import UserError
from tests.unit import small_tokenizers


@pytest.mark.parametrize("name", FAMILIES)
def test_every_name_of_the_table_is_a_model_type(name: str) -> None:
    assert AutoConfig.for_model(name).model_type == name


@pytest.mark.parametrize("name", small_tokenizers.NAMES)
def test_the_null_position_is_the_cls_token_where_there_is_one(name: str) -> None:
    tokenizer, family = small_tokenizers.tokenizer(name), small_tokenizers.family(name)
    template = find_template(tokenizer, family, FastEncoder(tokenizer))
    pair = ("aa", "bb") if not family.context_first else ("bb", "aa")
    ids = tokenizer(*pair)["input_ids"]
    null = template.null_offset if template.null_from_start else len(ids) - 1 - template.null_offset
    if family.causal or tokenizer.cls_token_id is None:
        assert null == len(ids) - 1
    else:
        assert [position for position, token in enumerate(ids) if token == tokenizer.cls_token_id] == [null]


@pytest.mark.parametrize("name", ["bert", "xlnet"])
@pytest.mark.parametrize("length", [None, 77])
def test_a_check_leaves_the_tokenizer_as_it_was(name: str, length: int | None) -> None:
    """It is saved with the model, whether or not its features were in the cache."""
    tokenizer, family = small_tokenizers.tokenizer(name), small_tokenizers.family(name)
    if length is not None:
        tokenizer.backend_tokenizer.enable_truncation(length)
        tokenizer.backend_tokenizer.enable_padding(length=length)
    before = tokenizer.backend_tokenizer.to_str()
    encoder = FastEncoder(tokenizer)
    check_template(tokenizer, find_template(tokenizer, family, encoder), encoder)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_what_sets_single_families_apart() -> None:
    xlnet, llama, t5 = (small_tokenizers.family(name) for name in ("xlnet", "llama", "t5"))
    assert xlnet.context_first and xlnet.padding_side == "left"
    assert not llama.context_first and llama.padding_side == "left" and llama.null_rule == "last"
    assert llama.pad_token_id == small_tokenizers.tokenizer("llama").eos_token_id
    assert t5.null_rule == "last" and not t5.causal


@pytest.mark.parametrize(
    ("name", "change", "sent"),
    [
        ("bert", {}, True),
        ("roberta", {"type_vocab_size": 1}, False),
        ("distilbert", {}, False),
        ("xlnet", {}, True),
        ("funnel", {}, True),
        ("deberta-v2", {"type_vocab_size": 0}, False),
        ("deberta-v2", {"type_vocab_size": 2}, True),
        ("mpnet", {}, False),
        ("modernbert", {}, False),
        ("gpt2", {}, False),
    ],
)
def test_type_ids_are_sent_where_the_model_has_more_than_one(name: str, change: dict[str, int], sent: bool) -> None:
    config = AutoConfig.for_model(name, **change)
    assert family_of(config, small_tokenizers.tokenizer(name)).sends_token_type_ids == sent
    model = transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING[type(config)]
    assert ("token_type_ids" in model_columns(model, config)) == sent


def test_columns_are_those_that_forward_takes() -> None:
    config = AutoConfig.for_model("xlm")
    columns = model_columns(transformers.XLMForQuestionAnswering, config)
    assert "token_type_ids" not in columns and "cls_index" in columns
    assert ("langs" in columns) == (config.n_langs > 1)
    assert "langs" in model_columns(transformers.XLMForQuestionAnswering, AutoConfig.for_model("xlm", n_langs=3))
    assert model_columns(lambda input_ids, attention_mask: None, config) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(("name", "causal"), [("camembert", False), ("starcoder2", True), ("ernie", False)])
def test_a_family_outside_the_table_works_by_what_transformers_says(name: str, causal: bool, monkeypatch) -> None:
    monkeypatch.delitem(FAMILIES, name, raising=False)
    family = family_of(AutoConfig.for_model(name), small_tokenizers.tokenizer("bert"))
    assert family.causal == causal and family.null_rule == ("last" if causal else "cls")


def test_what_is_no_tokenizer_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="cannot encode a pair"):
        family_of(AutoConfig.for_model("starcoder2"), object())
