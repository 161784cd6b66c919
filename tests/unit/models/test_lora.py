"""LoRA adapters: refused options, trained parameters, and files that peft reads."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import BertConfig, BertForQuestionAnswering, XLNetConfig, XLNetForQuestionAnswering

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.loading import load_config, load_model
from qa_deepspeed.models.lora import (
    CONFIG_FILE,
    LoraSettings,
    add_adapters,
    base_of,
    check_lora,
    head_names,
    save_weights,
)
from qa_deepspeed.utils.errors import UserError

SETTINGS = LoraSettings(rank=2, alpha=4, dropout=0.0, target_modules=("all-linear",))


def options(**given: Any) -> RunOptions:
    return RunOptions(**given, given=frozenset(given))


def bert() -> BertForQuestionAnswering:
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return BertForQuestionAnswering(BertConfig(vocab_size=30, **size))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_rank": 0}, "lora_rank and lora_alpha must be at least 1"),
        ({"lora_rank": 4, "lora_dropout": 1.0}, "lora_dropout at least 0"),
        ({"lora_rank": 4, "lora_target_modules": " , "}, "names no module"),
        ({"lora_alpha": 8, "lora_dropout": 0.1}, "lora_alpha, lora_dropout without --lora_rank"),
    ],
)
def test_invalid_options_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_lora(options(**given))


def test_a_missing_peft_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'qa_deepspeed\[lora\]'"):
        check_lora(options(lora_rank=4))
    check_lora(options(learning_rate=1e-3))


def test_adapters_and_head_are_trained_and_nothing_else() -> None:
    model = bert()
    assert add_adapters(model, SETTINGS, "somewhere", 1) is not None
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"qa_outputs.weight", "qa_outputs.bias"}
    assert len(trained) == 2 + 2 * 6  # two matrices for each of six linear layers


def test_an_unknown_module_is_named_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="lora_target_modules q_proj: .*the model has .*query.*value"):
        add_adapters(bert(), LoraSettings(2, 4, 0.0, ("q_proj",)), "somewhere", 1)


def test_all_parts_of_a_beam_head_are_trained() -> None:
    model = XLNetForQuestionAnswering(XLNetConfig(vocab_size=30, d_model=8, n_layer=1, n_head=2, d_inner=12))
    assert head_names(model) == ["start_logits", "end_logits", "answer_class"]
    add_adapters(model, SETTINGS, "somewhere", 1)
    assert not [name for name, _ in model.named_parameters() if "lora_" in name and "logits" in name]


def test_saved_adapters_are_loaded_by_peft_and_here(tmp_path: Path) -> None:
    """The same answers from the trained model, peft's and ours; a missing base model is reported."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    bert().save_pretrained(base)
    model, _ = load_model(options(model_name_or_path=str(base)), load_config(options(model_name_or_path=str(base))))
    add_adapters(model, SETTINGS, str(base), 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    saved = save_weights(adapter, model, model.state_dict())
    assert all(name.startswith("base_model.model.") for name in saved)
    ids = torch.arange(12).view(2, 6)
    expected = model.eval()(ids).start_logits

    asked = options(model_name_or_path=str(adapter))
    ours, fresh = load_model(asked, load_config(asked))
    theirs = PeftModel.from_pretrained(BertForQuestionAnswering.from_pretrained(base), adapter)
    assert not fresh
    assert torch.equal(ours.eval()(ids).start_logits, expected)
    torch.testing.assert_close(theirs.eval()(ids).start_logits, expected)

    (adapter / "config.json").unlink()  # peft saves none
    assert load_config(asked).vocab_size == 30

    with pytest.raises(UserError, match="holds a LoRA adapter, which cannot be trained further"):
        check_lora(options(model_name_or_path=str(adapter)))
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="was trained on .*base, which does not exist"):
        base_of(str(adapter))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("{}", "cannot be read"),
        (json.dumps({"peft_type": "IA3", "base_model_name_or_path": "b"}), "of the kind IA3"),
    ],
)
def test_an_invalid_adapter_config_is_reported(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(UserError, match=message):
        base_of(str(tmp_path))
