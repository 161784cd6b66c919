"""Several files: weights behind their names, names that tell them apart, and ids that occur in two of them."""

import json
from pathlib import Path

import pytest

from qa_deepspeed.qa.data.files import distinct_names, split_weight
from qa_deepspeed.qa.data.read_report import ReadReport
from qa_deepspeed.qa.data.reading import DataSource, read_examples
from qa_deepspeed.utils.errors import UserError


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a.json", ("a.json", 1.0)),
        ("a.json=2", ("a.json", 2.0)),
        ("a=b.json=0.5", ("a=b.json", 0.5)),
        ("a=b.json", ("a=b.json", 1.0)),
        ("data/*.json=1.5", ("data/*.json", 1.5)),
    ],
)
def test_a_weight_stands_behind_the_last_sign(text: str, found: tuple[str, float]) -> None:
    assert split_weight(text) == found


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_weight_that_cannot_be_is_refused(weight: str) -> None:
    with pytest.raises(UserError, match=f"a.json={weight}: the weight of a file must be a number above 0"):
        split_weight(f"a.json={weight}")


def test_a_file_that_exists_has_its_whole_name(tmp_path: Path) -> None:
    path = tmp_path / "lr=0"
    path.touch()
    assert split_weight(str(path)) == (str(path), 1.0)
    assert split_weight(f"{path}=3") == (str(path), 3.0)
    assert split_weight(str(tmp_path / "l*=0")) == (str(tmp_path / "l*=0"), 1.0)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/x/a.json", "/y/b.json"], ["a.json", "b.json"]),
        (
            ["/x/squad/dev.json", "/x/news/dev.json", "/x/news/test.json"],
            ["squad/dev.json", "news/dev.json", "test.json"],
        ),
        (["/x/one/dev.json", "/y/one/dev.json"], ["x/one/dev.json", "y/one/dev.json"]),
        (["/dev.json", "/x/dev.json"], ["/dev.json", "x/dev.json"]),
        (["/x/dev.json", "/x/dev.json"], ["/x/dev.json", "/x/dev.json"]),
    ],
)
def test_files_of_one_base_name_are_told_apart_by_their_folders(paths: list[str], names: list[str]) -> None:
    assert distinct_names(paths) == names


def rows(path: Path, *ids: str) -> str:
    lines = [
        {
            "id": one,
            "question": "Where?",
            "context": f"In Rome, {path.name}.",
            "answers": {"text": ["Rome"], "answer_start": [3]},
        }
        for one in ids
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_ids_of_two_files_do_not_collide(tmp_path: Path) -> None:
    """An id that occurs twice in one file is a duplicate as before."""
    files = (rows(tmp_path / "a.jsonl", "1", "2"), rows(tmp_path / "b.jsonl", "1", "3", "3", "2/1"))
    report = ReadReport()
    found = [one.example_id for one in read_examples(DataSource(files, "evaluate", True, by_file=True), report)]
    assert found == ["1", "2", "2/1", "3", "2/2/1"]
    assert report.examples_by_file == [2, 3]
    assert report.rejected_by_reason == {"duplicate id": 1}
    assert report.notes == ["b.jsonl: 2 ids that an earlier file has too begin with 2/ here"]
    together = ReadReport()
    assert len(list(read_examples(DataSource(files, "evaluate", True), together))) == 4
    assert together.examples_by_file == [] and "examples_by_file" not in together.to_dict()


def test_examples_are_counted_by_file_where_some_are_drawn(tmp_path: Path) -> None:
    ids = [str(number) for number in range(30)]
    files = (rows(tmp_path / "a.jsonl", *ids[:10]), rows(tmp_path / "b.jsonl", *ids[10:]))
    report = ReadReport()
    drawn = DataSource(files, "train", True, max_examples=12, by_file=True)
    found = [int(one.example_id) for one in read_examples(drawn, report)]
    assert report.examples_by_file == [sum(one < 10 for one in found), sum(one >= 10 for one in found)]
    assert sum(report.examples_by_file) == 12 and min(report.examples_by_file) > 0
    report = ReadReport()
    first = DataSource(files, "evaluate", True, max_examples=7, by_file=True)
    assert len(list(read_examples(first, report))) == 7 and report.examples_by_file == [7]
    assert ReadReport.from_dict(report.to_dict()) == report
