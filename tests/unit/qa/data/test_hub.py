"""Data sets through `datasets.load_dataset`, here from folders, so that no network is needed."""

import json
import os

import pytest

from qa_deepspeed.qa.data.hub import hub_file
from qa_deepspeed.qa.data.reading import DataSource, ReadReport, read_examples
from qa_deepspeed.utils.errors import UserError


@pytest.fixture
def data_set(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for split, count in (("train", 10), ("validation", 3)):
        rows = [
            {
                "id": f"{split}{number}",
                "title": "t",
                "context": "It is blue.",
                "question": "What?",
                "answers": {"text": ["blue"] * (number % 3), "answer_start": [6] * (number % 3)},
            }
            for number in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def read(path):
    return list(read_examples(DataSource((path,), "train", True), ReadReport()))


def test_rows_of_a_split(data_set, tmp_path):
    path = hub_file(data_set, None, "train", tmp_path / "made", str(tmp_path / "cache"))
    examples = read(path)
    assert [one.example_id for one in examples] == [f"train{number}" for number in range(10)]
    assert [len(one.answers) for one in examples] == [number % 3 for number in range(10)]
    validation = hub_file(data_set, None, "validation", tmp_path / "made", str(tmp_path / "cache"))
    assert [one.example_id for one in read(validation)] == [f"validation{number}" for number in range(3)]
    part = hub_file(data_set, None, "train[2:5]", tmp_path / "made", str(tmp_path / "cache"))
    assert [one.example_id for one in read(part)] == ["train2", "train3", "train4"]
    assert len({path, validation, part}) == 3


def test_the_file_is_made_once_and_nothing_unfinished_stays(data_set, tmp_path):
    made = tmp_path / "made"
    path = hub_file(data_set, None, "train", made, str(tmp_path / "cache"))
    before = os.stat(path)
    assert hub_file(data_set, None, "train", made, str(tmp_path / "cache")) == path
    assert os.stat(path).st_mtime_ns == before.st_mtime_ns
    assert os.listdir(made) == [os.path.basename(path)]


@pytest.mark.parametrize(
    ("name", "split"), [("no/such_set_anywhere", "train"), (None, "no_such_split"), ("./absent folder", "train")]
)
def test_what_cannot_be_loaded_is_one_line(data_set, tmp_path, monkeypatch, name, split):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be loaded: ") as caught:
        hub_file(name or data_set, None, split, tmp_path / "made", str(tmp_path / "cache"))
    assert "\n" not in str(caught.value)
