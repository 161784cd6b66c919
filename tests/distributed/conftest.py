"""A generated corpus and tiny models for tests that start processes."""

import json
import shutil
from pathlib import Path

import pytest

from qa_deepspeed.cli.data.sample import write_sample

TRAIN_ARTICLES, DEV_ARTICLES = 40, 6


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.json, dev.json (SQuAD v2.0) and model/, a tiny BERT."""
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, 7, TRAIN_ARTICLES, DEV_ARTICLES)
    return folder


@pytest.fixture(scope="session")
def model_without_dropout(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's tiny BERT with every dropout at 0, so that runs can be compared step by step."""
    folder = tmp_path_factory.mktemp("still") / "model"
    shutil.copytree(sample / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def base_options(sample: Path, model_without_dropout: Path) -> dict[str, object]:
    """A short run on the generated corpus that logs every step."""
    return {
        "model_name_or_path": str(model_without_dropout),
        "train_file": str(sample / "train.json"),
        "predict_file": str(sample / "dev.json"),
        "cache_dir": str(sample / "cache"),
        "version_2_with_negative": True,
        "max_seq_length": 160,
        "doc_stride": 64,
        "max_train_examples": 60,
        "learning_rate": 1e-3,
        "max_steps": 12,
        "logging_steps": 1,
        "save_steps": 0,
    }
