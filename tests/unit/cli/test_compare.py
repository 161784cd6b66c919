"""`qa-deepspeed compare` on made records: what it shows, and its verdict on chance."""

from __future__ import annotations

import json
import re
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


def page_data(path: Path) -> dict[str, Any]:
    """The JSON inside a page."""
    data: dict[str, Any] = json.loads(
        re.findall('<script type="application/json" id="data">(.*)</script>', path.read_text())[0]
    )
    return data


def test_the_page_of_two_runs_has_won_and_lost_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = make_run(tmp_path / "one", 30), make_run(tmp_path / "other", 50, learning_rate=1e-3)
    answers = json.loads((other / "predictions.json").read_text())
    (other / "predictions.json").write_text(json.dumps({**answers, "0": "wrong", "55": "55"}))
    nbest = [{"text": "55", "probability": 0.75, "start_logit": 1.0, "end_logit": 1.0, "start": 7}]
    (other / "nbest_predictions.json").write_text(json.dumps({"55": nbest}))
    assert compare(one, other, "--report", tmp_path / "page.html") == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"page: {tmp_path}/page.html\n")
    data = page_data(tmp_path / "page.html")
    assert data["systems"] == ["one", "other"]
    outcomes = {row[0]: data["outcomes"][row[4]][0] for row in data["rows"]}
    expected = {n: "both_right" if n < 30 else "won" if n < 50 else "both_wrong" for n in range(QUESTIONS)}
    assert outcomes == {str(n): outcome for n, outcome in {**expected, 0: "lost", 55: "won"}.items()}
    (row,) = (row for row in data["rows"] if row[0] == "55")
    assert row[3] == [[7, 2]] and row[5] == [["wrong", None, 0.0, []], [[7, 2], 0.75, 1.0, [[[7, 2], 0.75]]]]
    document = (tmp_path / "page.html").read_text()
    verdict = next(line for line in printed.splitlines() if "against" in line).replace(f"{tmp_path}/", "")
    assert verdict in document and "learning_rate" in document


def test_no_page_is_written_where_there_is_nothing_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = make_run(tmp_path / "one", 50), make_run(tmp_path / "other", 20, predict_file="another.json")
    target = tmp_path / "page.html"
    assert compare(one, other, "--report", target) == 2 and "different files" in capsys.readouterr().err
    assert compare(one, other, one, "--report", target) == 2 and "two runs" in capsys.readouterr().err
    assert compare(one, one, "--report", tmp_path / "gone" / "page.html") == 2
    assert "there is no folder" in capsys.readouterr().err and not target.exists()


def test_runs_on_several_files_are_compared_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids that an earlier file has too are named as evaluations name them."""
    runs = [make_run(tmp_path / name, right) for name, right in (("one", 30), ("other", 50))]
    gold = json.loads((tmp_path / "gold.json").read_text())
    gold["data"][0]["paragraphs"] = gold["data"][0]["paragraphs"][:3]
    (tmp_path / "more.json").write_text(json.dumps(gold))
    for run in runs:
        record = json.loads((run / "run.json").read_text())
        record["options"]["predict_file"] = f"{tmp_path}/gold.json,{tmp_path}/more.json"
        (run / "run.json").write_text(json.dumps(record))
    answers = json.loads((runs[1] / "predictions.json").read_text())
    (runs[1] / "predictions.json").write_text(json.dumps({**answers, "2/0": "0", "2/1": "1", "2/2": "wrong"}))
    assert compare(*runs, "--report", tmp_path / "page.html", "--json") == 0
    (test,) = json.loads(capsys.readouterr().out)["significance"]
    assert test["total"] == QUESTIONS + 3 and test["f1_b"] == pytest.approx(100 * 52 / (QUESTIONS + 3))
    data = page_data(tmp_path / "page.html")
    files = {row[0]: data["words"][row[7]] for row in data["rows"]}
    assert files["0"] == "/gold.json" and files["2/0"] == "/more.json" and len(files) == QUESTIONS + 3
