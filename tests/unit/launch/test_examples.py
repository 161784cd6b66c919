"""The run files of launch/examples: read as the command line reads them, resolved with their DeepSpeed config, and fit
for the kind of model they name."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoConfig

from qa_deepspeed.cli.training import check as preflight
from qa_deepspeed.config import options
from qa_deepspeed.config.run_options import RunOptions, check_objective
from qa_deepspeed.engine import ds_config
from qa_deepspeed.qa.features.families import FAMILIES
from tests.paths import REPOSITORY
from tests.unit import small_tokenizers

EXAMPLES = sorted((REPOSITORY / "launch" / "examples").glob("*.yaml"))
MODEL_TYPES = {
    "bert-base-uncased": "bert",
    "bert-large-uncased-whole-word-masking": "bert",
    "FacebookAI/roberta-large": "roberta",
    "microsoft/deberta-v3-large": "deberta-v2",
    "xlnet/xlnet-large-cased": "xlnet",
    "answerdotai/ModernBERT-base": "modernbert",
    "mistralai/Mistral-7B-v0.1": "mistral",
}
"""Model type of each model, and nothing else of it: no weights and no network are needed."""


def read(path: Path) -> RunOptions:
    return options.build(RunOptions, "train", {}, str(path))


def test_there_is_one_for_each_kind_of_model() -> None:
    assert {MODEL_TYPES[str(read(path).model_name_or_path)] for path in EXAMPLES} == set(MODEL_TYPES.values())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_example_resolves_on_any_usual_number_of_ranks(path: Path, world_size: int) -> None:
    wanted = read(path)
    resolved = ds_config.resolve(wanted, world_size, "cuda", True)
    check_objective(resolved.options)
    assert resolved.plan.global_batch_size == wanted.global_batch_size
    assert resolved.precision == "bf16"
    config = ds_config.finish(resolved, 1000, 1024)
    assert "auto" not in str(config)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fits_its_model_and_its_data(path: Path) -> None:
    wanted = read(path)
    model_type = MODEL_TYPES[str(wanted.model_name_or_path)]
    assert model_type in FAMILIES
    longest = getattr(AutoConfig.for_model(model_type), "max_position_embeddings", None)
    assert not longest or longest <= 0 or wanted.max_seq_length <= longest
    assert wanted.dataset_name == ("rajpurkar/squad_v2" if wanted.version_2_with_negative else "rajpurkar/squad")
    assert wanted.max_seq_length - wanted.max_query_length - 4 >= wanted.doc_stride
    assert wanted.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_passes_check(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On machines that are large enough; the config class of the kind of model and a small tokenizer stand in."""
    wanted = read(path)
    model_type = MODEL_TYPES[str(wanted.model_name_or_path)]
    AutoConfig.for_model(model_type).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").touch()  # no weights are read
    small_tokenizers.tokenizer({"mistral": "llama"}.get(model_type, model_type)).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(preflight, "free_host_memory", lambda: 2**50)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**50))
    stand_in = dataclasses.replace(
        wanted, model_name_or_path=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), no_cuda=True
    )
    assert preflight.check(stand_in, ranks=2, port=0) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert (
        f"{model_type}, " in printed and f"ZeRO stage {3 if wanted.deepspeed_config == 'zero3' else 2}, bf16" in printed
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_where_its_numbers_come_from(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ") and any(source in text for source in ("arXiv", "README of", "repository", "published"))
    assert isinstance(yaml.safe_load(text), dict)
