"""Loading a model that a stranger made, or that lacks parts: one line, and nothing of it runs."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForQuestionAnswering

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.inference.answerer import QuestionAnswerer
from qa_deepspeed.models.facts import model_facts
from qa_deepspeed.models.loading import (
    load_config,
    load_model,
    load_tokenizer,
    missing_in_backbone,
    require_trained_weights,
)
from qa_deepspeed.utils.errors import UserError
from tests.unit import small_tokenizers


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a tiny model and its tokenizer."""
    tokenizer = small_tokenizers.tokenizer("bert")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertForQuestionAnswering(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def options(folder: Path, **changes: object) -> RunOptions:
    return RunOptions(model_name_or_path=str(folder), max_seq_length=64, **changes)  # type: ignore[arg-type]


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose code writes a file; every prompt is answered with yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Tokenizer: pass\n"
    )
    return folder


def test_a_path_that_does_not_exist_is_no_name_on_the_hub() -> None:
    for name in ("./nomodel", "/nowhere/model", "../nomodel"):
        with pytest.raises(UserError, match=f"{name}: no such folder"):
            load_config(options(Path(name)) if name[0] == "/" else RunOptions(model_name_or_path=name))


def test_the_code_of_a_config_is_not_run(stranger: Path) -> None:
    (stranger / "config.json").write_text(
        json.dumps({"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}})
    )
    with pytest.raises(UserError, match="the config of .* needs Python code .* never run"):
        load_config(options(stranger))
    assert not (stranger.parent / "ran").exists()


def test_the_code_of_a_tokenizer_is_not_run(stranger: Path, model: Path) -> None:
    shutil.copytree(model, stranger, dirs_exist_ok=True)
    (stranger / "tokenizer.json").unlink()
    for path in stranger.glob("vocab*"):
        path.unlink()
    (stranger / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}})
    )
    with pytest.raises(UserError):
        load_tokenizer(options(stranger))
    assert not (stranger.parent / "ran").exists()


def test_a_folder_without_tokenizer_files_is_an_error(model: Path) -> None:
    load_tokenizer(options(model))
    for path in model.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    with pytest.raises(UserError, match="no tokenizer files: copy them there, or pass --tokenizer_name|cannot load"):
        load_tokenizer(options(model))


def test_a_tokenizer_larger_than_the_embedding_is_an_error(model: Path) -> None:
    model_facts(options(model))
    config = json.loads((model / "config.json").read_text())
    size = config["vocab_size"] - 1
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": size}))
    message = f"ids up to {size}, but the embedding of .* has {size} rows"
    with pytest.raises(UserError, match=message):
        model_facts(options(model))
    with pytest.raises(UserError, match=message):
        QuestionAnswerer.from_pretrained(str(model))


# ---- weights ----


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "truncated pickle", "other shape"])
def test_damaged_weights_are_one_line(model: Path, damage: str) -> None:
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    if damage == "truncated pickle":
        weights.unlink()
        weights = model / "pytorch_model.bin"
        torch.save(tensors, weights)
    if damage == "other shape":
        tensors["bert.encoder.layer.0.output.dense.bias"] = torch.zeros(9)
        save_file(tensors, weights, {"format": "pt"})
    elif damage == "garbage":
        weights.write_bytes(bytes(range(256)) * 10)
    else:
        weights.write_bytes(weights.read_bytes()[: 0 if damage == "empty" else weights.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot load the weights of") as raised:
        load_model(options(model), load_config(options(model)))
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError) as raised:
        QuestionAnswerer.from_pretrained(str(model))
    assert "\n" not in str(raised.value)


def test_missing_layers_are_distinguished_from_a_fresh_head(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.startswith("qa_outputs")}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    loaded, fresh = load_model(options(model), load_config(options(model)))
    assert fresh == ["qa_outputs.bias", "qa_outputs.weight"] and missing_in_backbone(loaded, fresh) == []
    with pytest.raises(UserError, match="no trained question-answering head"):
        require_trained_weights(str(model), loaded, fresh)
    layer = {name for name in tensors if name.startswith("bert.encoder.layer.0.output")}
    kept = {name: value for name, value in tensors.items() if name not in layer}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    loaded, fresh = load_model(options(model), load_config(options(model)))
    assert set(missing_in_backbone(loaded, fresh)) == set(fresh) == layer and len(layer) == 4
    with pytest.raises(UserError, match="is incomplete"):
        require_trained_weights(str(model), loaded, fresh)
