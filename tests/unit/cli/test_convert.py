"""`qa-deepspeed convert`: what is read is what the converted file gives."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qa_deepspeed.cli.main import main
from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.data.read_report import ReadReport
from qa_deepspeed.qa.data.reading import DataSource, read_examples
from tests.paths import DATA, needs_real_data


def convert(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["convert", *map(str, arguments)])
    return int(ended.value.code or 0)


def read(path: Path) -> list[Example]:
    return list(read_examples(DataSource((str(path),), "train", True), ReadReport()))


TEXT = st.text(alphabet='ab é東😀\r\n\t"\\', min_size=1, max_size=20)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(parts=st.lists(st.tuples(TEXT, TEXT, st.booleans()), min_size=1, max_size=6))
def test_the_round_trip_keeps_every_question(tmp_path: Path, parts: list[tuple[str, str, bool]]) -> None:
    paragraphs = []
    for number, (before, question, answerable) in enumerate(parts):
        context = f"{before}answer{number}."
        answers = [{"text": f"answer{number}", "answer_start": len(before)}] if answerable else []
        fields = {"id": number, "question": f"Q{question}", "answers": answers, "is_impossible": not answerable}
        paragraphs.append({"context": context, "qas": [fields]})
    source, out = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps({"version": "v2.0", "data": [{"paragraphs": paragraphs}]}))
    assert convert(source, out) == 0
    assert read(out) == read(source) and len(read(out)) == len(parts)
    again = tmp_path / "again.json"
    assert convert(out, again) == 0
    assert again.read_bytes() == out.read_bytes()


def test_a_table_with_columns_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "in.csv", tmp_path / "out.json"
    with path.open("w", newline="", encoding="cp1252") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["asked", "body", "gold", "at"])
        writer.writerow(["Who?", "Zoë came.", "Zoë", "0"])
        writer.writerow(["Where?", "Zoë came.", "absent", "0"])
    names = ("--question_column", "asked", "--context_column", "body", "--answer_text_column", "gold")
    assert convert(path, out, *names, "--answer_start_column", "at", "--encoding", "cp1252") == 0
    (example,) = read(out)
    assert (example.question, example.answers[0].text, example.answers[0].start) == ("Who?", "Zoë", 0)
    assert "left out: " in capsys.readouterr().err
    assert convert(path, path) == 2 and "is the file that is read" in capsys.readouterr().err


@needs_real_data
def test_real_data_survive(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert convert(DATA / "en-v2-dev.json", out) == 0
    assert read(out) == read(DATA / "en-v2-dev.json")
