"""A student with some layers of a model: the same as that model without its other layers, for several families."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertConfig,
    AutoModelForQuestionAnswering,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    ModernBertConfig,
    PretrainedConfig,
    T5Config,
)

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import zero3_loading
from qa_deepspeed.models.loading import load_config
from qa_deepspeed.models.student_layers import check_student_layers
from qa_deepspeed.utils.errors import UserError

SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
CONFIGS: dict[str, tuple[PretrainedConfig, str]] = {
    "bert": (BertConfig(**SMALL, intermediate_size=16), "bert.encoder.layer"),
    "distilbert": (
        DistilBertConfig(vocab_size=50, dim=16, n_layers=4, n_heads=2, hidden_dim=16),
        "distilbert.transformer.layer",
    ),
    "gpt2": (GPT2Config(vocab_size=50, n_embd=16, n_layer=4, n_head=2, n_positions=32), "transformer.h"),
    "modernbert": (
        ModernBertConfig(
            **SMALL, intermediate_size=16, global_attn_every_n_layers=3, local_attention=4, pad_token_id=0
        ),
        "model.layers",
    ),
}


def options(folder: Path, layers: str | None, **changes: Any) -> RunOptions:
    return RunOptions(model_name_or_path=str(folder), student_layers=layers, **changes)


def saved(config: PretrainedConfig, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForQuestionAnswering.from_config(copy.deepcopy(config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)  # type: ignore[operator]
    return model.eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_a_student_is_the_model_without_its_other_layers(family: str, tmp_path: Path) -> None:
    config, stack = CONFIGS[family]
    full = saved(config, tmp_path)
    run = options(tmp_path, "0,3")
    check_student_layers(run)
    student, fresh = zero3_loading.load(run, load_config(run), {})
    assert not fresh and student.config.num_hidden_layers == 2
    layers = full.get_submodule(stack)
    full.set_submodule(stack, torch.nn.ModuleList([layers[0], layers[3]]))  # type: ignore[index]
    full.config.num_hidden_layers = 2
    inputs = {"input_ids": torch.arange(1, 21).reshape(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    with torch.no_grad():
        expected, found = full(**inputs, use_cache=False) if family == "gpt2" else full(**inputs), student(**inputs)
    torch.testing.assert_close(found.start_logits, expected.start_logits)
    student.save_pretrained(tmp_path / "student")  # type: ignore[operator]
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "student").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).end_logits, found.end_logits)


@pytest.mark.parametrize(
    ("layers", "changes", "message"),
    [
        ("0,4", {}, "student_layers names layer 4, but .* has 4, counted from 0"),
        ("2,0", {}, "student_layers 2,0: write rising numbers, counted from 0, like 0,2,4"),
        ("1,1", {}, "write rising numbers"),
        ("0-2", {}, "write rising numbers"),
        ("", {}, "write rising numbers"),
        ("0,1", {"lora_rank": 8}, "student_layers with lora_rank"),
    ],
)
def test_layers_that_are_not_there_are_one_line(
    layers: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(CONFIGS["bert"][0], tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_config(options(tmp_path, layers, **changes))
    assert "\n" not in str(caught.value)


def test_models_without_a_stack_of_layers_are_refused(tmp_path: Path) -> None:
    """An ALBERT's layers share their weights; a T5 has two stacks."""
    albert = AlbertConfig(**SMALL, embedding_size=8, intermediate_size=16)
    t5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    for config, refuse in ((albert, check_student_layers), (t5, check_student_layers), (t5, load_config)):
        config.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=re.escape("has no single stack of layers to choose from")):
            refuse(options(tmp_path, "0,1"))


def test_an_incomplete_model_starts_no_student(tmp_path: Path) -> None:
    """Missing weights would be drawn at random."""
    saved(CONFIGS["bert"][0], tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["bert.encoder.layer.3.output.dense.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    run = options(tmp_path, "0,3")
    with pytest.raises(UserError, match="student_layers: .* has not all its weights"):
        zero3_loading.load(run, load_config(run), {})
