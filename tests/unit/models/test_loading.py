"""Loading a model that a stranger made, or that lacks parts: one line, and nothing of it runs."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import pytest
from transformers import BertConfig, BertForQuestionAnswering

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.inference.answerer import QuestionAnswerer
from qa_deepspeed.models.facts import model_facts
from qa_deepspeed.models.loading import load_config, load_tokenizer
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
