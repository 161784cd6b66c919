"""`qa-deepspeed compare` on made records: what it shows, and its verdict on chance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qa_deepspeed.cli.main import main

QUESTIONS = 60


def make_run(folder: Path, right: int, **options: Any) -> Path:
    folder.mkdir()
    gold = folder.parent / "gold.json"
    paragraphs = [
        {
            "context": f"number {n}",
            "qas": [{"id": str(n), "question": "which?", "answers": [{"text": str(n), "answer_start": 7}]}],
        }
        for n in range(QUESTIONS)
    ]
    gold.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    answers = {str(n): str(n) if n < right else "wrong" for n in range(QUESTIONS)}
    (folder / "predictions.json").write_text(json.dumps(answers))
    record = {
        "status": "finished",
        "identity": {"steps": 10},
        "metrics": {"f1": 100 * right / QUESTIONS},
        "seconds": {"training": 12.5},
        "options": {"learning_rate": 1e-4, "predict_file": str(gold), "output_dir": str(folder), **options},
        "software": {"versions": {"torch": "2.13.0"}, "commit": None},
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def compare(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_runs_stand_side_by_side_with_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = make_run(tmp_path / "one", 50), make_run(tmp_path / "other", 20, learning_rate=1e-3)
    assert compare(one, other) == 0
    shown = capsys.readouterr().out
    assert "options that differ  one     other\n" in shown and "learning_rate        0.0001  0.001\n" in shown
    assert "output_dir" not in shown and "torch" not in shown and "seconds.training" in shown
    assert f"F1 33.33 against 83.33 on {QUESTIONS} questions, -50.00" in shown and ": significant" in shown


def test_a_small_difference_is_called_chance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / name, right) for name, right in (("a", 50), ("b", 49), ("c", 10))]
    assert compare(*runs, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [test["more_than_chance"] for test in report["significance"]] == [False, True]
    assert report["scores"]["f1"] == [100 * right / QUESTIONS for right in (50, 49, 10)]


def test_why_nothing_can_be_said_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = make_run(tmp_path / "one", 50), make_run(tmp_path / "other", 20, predict_file="another.json")
    assert compare(one, other) == 0
    assert "they answered different files" in capsys.readouterr().out
    assert compare(one, other, "--gold", "gone.json") == 0
    assert "are not at gone.json" in capsys.readouterr().out
    (other / "predictions.json").unlink()
    assert compare(one, other, "--gold", tmp_path / "gold.json") == 0
    assert "is unknown" in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make_run(tmp_path / "one", 50)
    assert compare(one) == 2 and "two runs or more" in capsys.readouterr().err
    assert compare(one, tmp_path) == 2 and "holds no training run" in capsys.readouterr().err
    for content in ("[]", "5", "null", "", '{"identity": []}', '{"identity": {}, "options": 5}'):
        (tmp_path / "run.json").write_text(content)
        assert compare(one, tmp_path) == 2 and capsys.readouterr().err.count("\n") == 1
    (tmp_path / "run.json").write_text("[]")
    assert compare(one, tmp_path) == 2 and "not the record" in capsys.readouterr().err
