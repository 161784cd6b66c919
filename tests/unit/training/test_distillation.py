"""Teachers in one process: their probabilities against a model called row by row, the cache of logits, refusals."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer, BertModel, DistilBertConfig

from qa_deepspeed.cli.data.sample import write_sample
from qa_deepspeed.config.run_options import RunOptions, check_distillation
from qa_deepspeed.engine import zero3_loading
from qa_deepspeed.engine.ds_config import resolve
from qa_deepspeed.models.facts import model_facts
from qa_deepspeed.qa.cache import teacher_logits
from qa_deepspeed.qa.cache.teacher_logits import LogitsCache, SoftTargets
from qa_deepspeed.qa.features.windows import splits_of
from qa_deepspeed.training import distillation
from qa_deepspeed.training.distillation import find_teachers, load_teachers, soft_targets
from qa_deepspeed.training.features import load_features
from qa_deepspeed.utils.errors import StorageError, UserError

TEMPERATURE = 2.0


def save_teacher(sample: Path, name: str, seed: int) -> Path:
    """A model with random weights and logits that are far apart."""
    torch.manual_seed(seed)
    model = AutoModelForQuestionAnswering.from_config(AutoConfig.from_pretrained(sample / "model"))
    model.qa_outputs.weight.data.mul_(20)
    model.save_pretrained(sample / name)
    AutoTokenizer.from_pretrained(sample / "model").save_pretrained(sample / name)
    return sample / name


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.json, the student model/ and the teachers first/ and second/."""
    folder = tmp_path_factory.mktemp("sample") / "it"
    write_sample(folder, 3, 6, 2)
    save_teacher(folder, "first", 1)
    save_teacher(folder, "second", 2)
    return folder


def options(sample: Path, cache: Path, teachers: str = "first", **changes: Any) -> RunOptions:
    settings: dict[str, Any] = {
        "model_name_or_path": str(sample / "model"),
        "teacher_model_name_or_path": ",".join(str(sample / name) for name in teachers.split(",")),
        "distillation_temperature": TEMPERATURE,
        "train_file": str(sample / "train.json"),
        "cache_dir": str(cache),
        "version_2_with_negative": True,
        "max_seq_length": 36,
        "doc_stride": 8,
        "max_query_length": 16,
        "max_train_examples": 30,
        "deepspeed_config": "zero0",
        "no_cuda": True,
    }
    return RunOptions(**settings | changes)


def distil(run: RunOptions) -> SoftTargets:
    """The soft targets of a run, as `train` gets them."""
    facts = model_facts(run)
    store = load_features(run, "train", facts)
    targets = soft_targets(load_teachers(run, facts, store), store, resolve(run, 1, "cpu"), torch.device("cpu"))
    assert targets is not None
    return targets


def by_hand(run: RunOptions) -> tuple[np.ndarray, np.ndarray]:
    """The mean of softmax(logits / T) over the teachers, of each row alone, in the order of a store."""
    store = load_features(run, "train", model_facts(run))
    models = [AutoModelForQuestionAnswering.from_pretrained(name).eval() for name in run.teachers]
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for number in range(len(store)):
        row = store.take(np.array([number]))
        assert row.token_type_ids is not None
        inputs = {"input_ids": torch.from_numpy(row.input_ids[None]).long()}
        inputs["token_type_ids"] = torch.from_numpy(row.token_type_ids[None]).long()
        places = [int(row.null_position[0]), *range(int(row.context_begin[0]), int(row.context_end[0]))]
        with torch.no_grad():
            outputs = [model(**inputs) for model in models]
        for side, name in enumerate(("start_logits", "end_logits")):
            logits = torch.stack([one[name][0, places].double() for one in outputs])
            found[side].append((logits / TEMPERATURE).softmax(dim=1).mean(dim=0).numpy())
    return np.concatenate(found[0]), np.concatenate(found[1])


def rows_of(targets: SoftTargets) -> tuple[np.ndarray, np.ndarray]:
    rows = targets.take(np.arange(len(targets._store)))
    assert rows.soft_start is not None and rows.soft_end is not None
    return rows.soft_start, rows.soft_end


@pytest.mark.parametrize("teachers", ["first", "first,second"])
def test_probabilities_are_those_of_the_models(
    sample: Path, tmp_path: Path, teachers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts that end within the data; rows are taken in any order."""
    monkeypatch.setattr(teacher_logits, "PART_ROWS", 7)
    run = options(sample, tmp_path, teachers)
    targets = distil(run)
    expected = by_hand(run)
    for found, wanted in zip(rows_of(targets), expected, strict=True):
        assert found.dtype == np.float32 and wanted.max() > 0.1
        np.testing.assert_allclose(found, wanted, atol=2e-3)  # half precision
    order = np.array([9, 0, 23, 8, 8])
    splits = splits_of(targets._caches[0].counts(np.arange(24)))
    wanted = np.concatenate([expected[0][splits[row] : splits[row + 1]] for row in order])
    np.testing.assert_allclose(targets.take(order).soft_start, wanted, atol=2e-3)


def test_a_second_run_loads_no_teacher(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does one of another student, temperature or folder of the same teacher; but one of other weights does."""
    first = rows_of(distil(options(sample, tmp_path)))
    assert "computed in" in capsys.readouterr().out
    shutil.copytree(sample / "first", tmp_path / "copy")

    def refuse(*_: Any) -> None:
        raise AssertionError("a teacher is loaded")

    with monkeypatch.context() as patch:
        patch.setattr(zero3_loading, "load", refuse)
        again = options(sample, tmp_path, model_name_or_path=str(sample / "second"), learning_rate=1.0)
        again = replace(again, teacher_model_name_or_path=str(tmp_path / "copy"))
        for one, other in zip(first, rows_of(distil(again)), strict=True):
            assert np.array_equal(one, other)
        assert "(from the cache)" in capsys.readouterr().out
        with pytest.raises(AssertionError, match="a teacher is loaded"):
            distil(options(sample, tmp_path, overwrite_cache=True))
        shutil.copy(sample / "second" / "model.safetensors", tmp_path / "copy")
        with pytest.raises(AssertionError, match="a teacher is loaded"):
            distil(again)


def test_what_an_interruption_leaves_is_kept(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = rows_of(distil(options(sample, tmp_path / "whole")))
    monkeypatch.setattr(teacher_logits, "PART_ROWS", 7)
    written: list[int] = []
    write = LogitsCache.write

    def stop_at_third(self: LogitsCache, part: int, *logits: np.ndarray) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(part)
        write(self, part, *logits)

    run = options(sample, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(LogitsCache, "write", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            distil(run)
    capsys.readouterr()
    targets = distil(run)
    rest = len(targets._store) - 14
    assert written == [0, 1] and f"logits of {rest:,} features computed" in capsys.readouterr().out
    for one, other in zip(expected, rows_of(targets), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3)  # other micro-batches


@pytest.mark.parametrize("damage", ["bytes", "truncated", "status"])
def test_a_damaged_file_is_computed_again(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    monkeypatch.setattr(teacher_logits, "PART_ROWS", 7)
    run = options(sample, tmp_path)
    targets = distil(run)
    expected = rows_of(targets)
    file = targets._caches[0].folder / "logits-00001.arrow"
    content = bytearray(file.read_bytes())
    if damage == "status":
        file.with_suffix(".json").write_text('{"size": 1, "checksum": "0"}')
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content[:-1] if damage == "truncated" else content)
    fresh = SoftTargets(targets._store, [LogitsCache(file.parent.parent, "x", targets._store)], 1.0)
    fresh._caches[0].folder = file.parent
    with pytest.raises(StorageError, match="start again"):
        rows_of(fresh)
    capsys.readouterr()
    again = distil(run)
    out = capsys.readouterr().out
    assert "logits-00001" in out and "computing it again" in out and "logits of 7 features computed" in out
    for one, other in zip(expected, rows_of(again), strict=True):
        assert np.array_equal(one, other)


def test_a_teacher_with_other_inputs_and_the_same_tokens_is_used(sample: Path, tmp_path: Path) -> None:
    """A DistilBERT takes no token types, so its features have a key of their own."""
    vocabulary = AutoConfig.from_pretrained(sample / "model").vocab_size
    config = DistilBertConfig(vocab_size=vocabulary, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    student = tmp_path / "distilbert"
    AutoModelForQuestionAnswering.from_config(config).save_pretrained(student)
    AutoTokenizer.from_pretrained(sample / "model").save_pretrained(student)
    plain = options(sample, tmp_path)
    run = replace(plain, model_name_or_path=str(student))
    assert find_teachers(run, model_facts(run))[0].features != load_features(run, "train", model_facts(run)).fingerprint
    for one, other in zip(rows_of(distil(run)), by_hand(plain), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3)


def test_a_teacher_of_other_tokens_is_refused(sample: Path, tmp_path: Path) -> None:
    """Another vocabulary at once; the same vocabulary with other rules when the rows are compared."""
    teacher = tmp_path / "teacher"
    shutil.copytree(sample / "first", teacher)
    run = replace(options(sample, tmp_path), teacher_model_name_or_path=str(teacher))
    AutoTokenizer.from_pretrained(teacher, do_lower_case=False).save_pretrained(teacher)
    with pytest.raises(UserError, match=re.escape(f"teacher {teacher} cuts the training text into other tokens")):
        distil(run)
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary["zzzz"] = vocabulary.pop(last)
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=re.escape(f"teacher {teacher} has another vocabulary than")) as caught:
        find_teachers(run, model_facts(run))
    assert "\n" not in str(caught.value)


def test_teachers_that_cannot_teach_are_refused(sample: Path, tmp_path: Path) -> None:
    """One without a trained head, one whose logits are not finite, one that is not there."""
    untrained = tmp_path / "untrained"
    BertModel(AutoConfig.from_pretrained(sample / "model")).save_pretrained(untrained)
    AutoTokenizer.from_pretrained(sample / "model").save_pretrained(untrained)
    run = options(sample, tmp_path / "cache")
    with pytest.raises(UserError, match="no trained question-answering head"):
        distil(replace(run, teacher_model_name_or_path=str(untrained)))
    broken = save_teacher(sample, "broken", 4)
    model = AutoModelForQuestionAnswering.from_pretrained(broken)
    model.qa_outputs.bias.data[0] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(UserError, match=f"teacher {broken} gives logits that are not finite"):
        distil(replace(run, teacher_model_name_or_path=str(broken)))
    with pytest.raises(UserError, match="no such folder"):
        distil(replace(run, teacher_model_name_or_path="/nowhere/model"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation_weight": 1.5}, "distillation_weight must be from 0 to 1, not 1.5"),
        ({"distillation_temperature": 0.0}, "distillation_temperature must be more than 0, not 0.0"),
        ({"teacher_model_name_or_path": None}, "distillation_temperature without a teacher: pass --teacher_model"),
    ],
)
def test_options_out_of_range_are_one_line(sample: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run = options(sample, tmp_path, given=frozenset({"distillation_temperature"}), **changes)
    with pytest.raises(UserError, match=message):
        check_distillation(run)


def test_all_ranks_compute_and_each_row_comes_once(sample: Path, tmp_path: Path) -> None:
    """A row that is missing or comes twice is found before anything is written."""
    run = options(sample, tmp_path)
    store = load_features(run, "train", model_facts(run))
    cache = LogitsCache(tmp_path, "key", store)
    width = int(cache.counts(cache.rows(0)).max())
    half = np.zeros((len(store) - 1, width), np.float16)
    arrived = {"feature_id": np.arange(len(store) - 1), "start": half, "end": half}
    with pytest.raises(AssertionError, match="every row comes once"):
        distillation._compute_part(cache, 0, lambda extract: iter([arrived]), "name")
