"""From options to features: data files, columns, settings and the cache folder."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qa_deepspeed.cli.data.sample import write_sample
from qa_deepspeed.config.batch_plan import plan_batches
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.facts import model_facts
from qa_deepspeed.models.loading import load_config
from qa_deepspeed.qa.features.mixture import rows_of_epoch
from qa_deepspeed.training.evaluation.evaluate import log_features
from qa_deepspeed.training.features import (
    EPOCH_ROWS,
    cache_folder,
    file_weights,
    load_features,
    look_up_features,
    notes,
    warnings_of_files,
)
from qa_deepspeed.training.loop import Run
from qa_deepspeed.utils.errors import UserError

REST = (
    "output_dir",
    "fingerprint",
    "layout",
    "group_by_length",
    "evaluation",
    "steps",
    "stops",
    "best",
    "previous",
    "tokenizer",
    "model_config",
)
"""Parts of a run that the sampler does not look at."""


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


def test_a_folder_without_a_model_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    with pytest.raises(UserError, match=f"{tmp_path} holds no model: there is no config.json"):
        load_config(RunOptions(model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "message"), [('{"model_type": "bert", "hidden_size": "x"}', "hidden_size"), ("5", "config"), ("{", "JSON")]
)
def test_an_invalid_config_gives_a_one_line_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"cannot load the config of .*{message}") as error:
        load_config(RunOptions(model_name_or_path=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_weights_of_files_decide_the_rows_of_an_epoch(sample: Path, tmp_path: Path) -> None:
    """Before the features are built and after, and in the training loop; plain names leave all as it is."""
    rows = rows_of(sample / "train.json")
    for name, part in (("a", rows[:50]), ("b", rows[50:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    names = {"id_column": "key", "question_column": "ask", "context_column": "text", "answers_column": "gold"}

    def given(first: str, second: str) -> RunOptions:
        return options(sample, train_file=f"{tmp_path}/a.jsonl{first},{tmp_path}/b.jsonl{second}", **names)

    facts = model_facts(given("", ""))
    plain = load_features(given("", ""), "train", facts)
    assert plain.files == () and plain.rows_by_file.tolist() == [len(plain)]
    assert file_weights(given("", "")) is None and file_weights(given("=1", "")) is None
    assert look_up_features(given("=1", "=1"), "train", facts)[0] == plain.fingerprint
    mixed = given("=2", "=0.5")
    weights = file_weights(mixed)
    assert weights == (2.0, 0.5) and look_up_features(mixed, "train", facts)[1] is None
    store = load_features(mixed, "train", facts)
    assert store.files == ("a.jsonl", "b.jsonl") and store.examples.ids == plain.examples.ids
    of_a = [row["key"] for row in rows[:50]]
    owner = store.file_of_examples()
    assert owner is not None and [one in of_a for one in store.examples.ids] == (owner == 0).tolist()
    in_a, in_b = store.rows_by_file.tolist()
    assert in_a + in_b == len(store) and in_a == int((owner[store.example_index] == 0).sum())
    fingerprint, counts = look_up_features(mixed, "train", facts)
    assert counts is not None and counts[EPOCH_ROWS] == 2 * in_a + max(1, round(in_b / 2))
    other = look_up_features(given("=3", ""), "train", facts)
    assert other[0] == fingerprint == store.fingerprint, "weights do not change the features"
    assert other[1] is not None and other[1][EPOCH_ROWS] == 3 * in_a + in_b
    run: Any = Run(
        options=mixed,
        resolved=SimpleNamespace(plan=plan_batches(4, None, None, 2)),
        store=store,
        weights=weights,
        **dict.fromkeys(REST),
    )
    assert run.rows_per_epoch == counts[EPOCH_ROWS] and run.steps_per_epoch == -(-run.rows_per_epoch // 8)
    orders = [run.order_of_epoch(epoch) for epoch in (0, 1, 0)]
    assert [len(order) for order in orders] == [run.steps_per_epoch] * 3
    taken = [np.concatenate(order) for order in orders]
    assert np.array_equal(taken[0], taken[2]) and not np.array_equal(np.sort(taken[0]), np.sort(taken[1]))
    assert np.array_equal(np.sort(taken[0]), np.sort(rows_of_epoch(store.rows_by_file, weights, mixed.seed, 0)))
    lengths = [store.lengths[step] for step in orders[0][:-1]]
    assert all((np.diff(step) <= 0).all() for step in lengths)


def test_a_file_that_is_trained_on_and_evaluated_on_is_a_warning(sample: Path, tmp_path: Path) -> None:
    """By whatever path, and among others."""
    links = [tmp_path / "link.json", tmp_path / "other.json"]
    for link in links:
        link.symlink_to(sample / "train.json")
    warning = "WARNING: trained on and evaluated on: {}: scores will be too high"
    one, two = f"{sample}/dev.json,{links[0]}", ",".join(map(str, links))
    assert warnings_of_files(options(sample, predict_file=one)) == [warning.format(links[0])]
    weighted = options(sample, train_file=f"{sample}/train.json=2", predict_file=two)
    assert warnings_of_files(weighted) == [warning.format(f"{links[0]} and 1 more file")]
    assert warnings_of_files(options(sample, predict_file=f"{sample}/dev.json")) == []
    assert warnings_of_files(options(sample, validation_split=0.1)) == []


def test_windows_without_an_answer_that_come_from_faulty_gold_answers_are_said_to(tmp_path: Path, sample: Path) -> None:
    rows = rows_of(sample / "dev.json")
    answerable = [row for row in rows if row["gold"]["text"]][:6]
    for row in answerable[:2]:
        row["gold"]["text"] = ["nowhere in the text"]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answerable))
    names = {"id_column": "key", "question_column": "ask", "context_column": "text", "answers_column": "gold"}
    given = options(sample, predict_file=f"{tmp_path}/dev.jsonl", **names)
    store = load_features(given, "evaluate", model_facts(given))
    windows = int((store.example_index < 2).sum())
    assert f"2 questions and {windows} window" in notes(store)[-1]
    assert notes(store)[-1].endswith("of these have faulty gold answers only, which are not in the context")


def test_the_log_names_the_list_of_rejected_questions(
    tmp_path: Path, sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is one; an evaluation without an output folder writes none."""
    rows = rows_of(sample / "train.json")[:5]
    rows[2]["ask"] = ""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"id_column": "key", "question_column": "ask", "context_column": "text", "answers_column": "gold"}
    given = options(sample, train_file=f"{tmp_path}/train.jsonl", **names)
    store = load_features(given, "train", model_facts(given))
    log_features(store, "train", tmp_path, keep=False)
    assert "1 rejected" in capsys.readouterr().out and not (tmp_path / "rejected_train.jsonl").exists()
    log_features(store, "train", tmp_path)
    assert f"rejected questions, each with its reason: {tmp_path}/rejected_train.jsonl" in capsys.readouterr().out
    assert json.loads((tmp_path / "rejected_train.jsonl").read_text())["reason"] == "empty question"
