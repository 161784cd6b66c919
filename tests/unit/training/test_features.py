"""From options to features: data files, columns, settings and the cache folder."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qa_deepspeed.cli.sample import write_sample
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.facts import model_facts
from qa_deepspeed.models.loading import load_config
from qa_deepspeed.training.features import cache_folder, load_features
from qa_deepspeed.utils.errors import UserError


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, 3, 12, 4)
    return folder


def options(sample: Path, **changes: Any) -> RunOptions:
    settings: dict[str, Any] = {
        "model_name_or_path": str(sample / "model"),
        "train_file": str(sample / "train.json"),
        "cache_dir": str(sample / "cache"),
        "version_2_with_negative": True,
        "max_seq_length": 128,
        "doc_stride": 32,
    }
    return RunOptions(**settings | changes)


def rows_of(file: Path) -> list[dict[str, Any]]:
    articles = json.loads(file.read_text())["data"]
    return [
        {
            "key": qa["id"],
            "ask": qa["question"],
            "text": paragraph["context"],
            "gold": {
                "text": [answer["text"] for answer in qa["answers"]],
                "answer_start": [answer["answer_start"] for answer in qa["answers"]],
            },
        }
        for article in articles
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]


def test_rows_with_other_column_names_in_several_files_give_the_same_features(sample: Path, tmp_path: Path) -> None:
    rows = rows_of(sample / "train.json")
    for name, part in (("a", rows[:50]), ("b", rows[50:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    names = {"id_column": "key", "question_column": "ask", "context_column": "text", "answers_column": "gold"}
    facts = model_facts(options(sample))
    nested = load_features(options(sample), "train", facts)
    for named in (f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", f"{tmp_path}/*.jsonl"):
        flat = load_features(options(sample, train_file=named, **names), "train", facts)
        assert len(flat) == len(nested) and flat.examples.ids == nested.examples.ids
        everything = np.arange(len(flat))
        ours, theirs = flat.take(everything), nested.take(everything)
        for column in ("input_ids", "row_splits", "start", "end", "null_position"):
            np.testing.assert_array_equal(getattr(ours, column), getattr(theirs, column))


def test_windows_without_an_answer_can_be_dropped_in_v1(sample: Path, tmp_path: Path) -> None:
    answerable = [row for row in rows_of(sample / "train.json") if row["gold"]["text"]]
    file = tmp_path / "v1.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in answerable))
    names = {"id_column": "key", "question_column": "ask", "context_column": "text", "answers_column": "gold"}
    short = options(
        sample,
        train_file=str(file),
        version_2_with_negative=False,
        max_seq_length=32,
        doc_stride=4,
        max_query_length=16,
        **names,
    )
    facts = model_facts(short)
    kept = load_features(short, "train", facts)
    dropped = load_features(dataclasses.replace(short, windows_without_answer="drop"), "train", facts)
    without = int((kept.take(np.arange(len(kept))).start == kept.take(np.arange(len(kept))).null_position).sum())
    assert without > 0 and len(dropped) == len(kept) - without


def test_missing_data_and_too_long_rows_are_refused(sample: Path) -> None:
    facts = model_facts(options(sample))
    with pytest.raises(UserError, match="pass --train_file, --dataset_name, or --data_dir"):
        load_features(options(sample, train_file=None), "train", facts)
    with pytest.raises(UserError, match="max_seq_length 4096 is more than the 256 positions"):
        model_facts(options(sample, max_seq_length=4096))


def test_cache_folder_is_cache_dir_or_beside_the_data_or_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder(str(tmp_path / "c"), tmp_path / "d.json") == tmp_path / "c" / "features"
    assert cache_folder(None, tmp_path / "d.json").parent == tmp_path
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache_folder(None, tmp_path / "d.json") == tmp_path / "home" / "qa_deepspeed" / "features"


@pytest.mark.parametrize(
    ("text", "message"), [('{"model_type": "bert", "hidden_size": "x"}', "hidden_size"), ("5", "config"), ("{", "JSON")]
)
def test_an_invalid_config_gives_a_one_line_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"cannot load the config of .*{message}") as error:
        load_config(RunOptions(model_name_or_path=str(tmp_path)))
    assert "\n" not in str(error.value)
