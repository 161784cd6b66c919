"""`qa-deepspeed predict`: files, standard input and single questions in; lines or a predictions file out."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qa_deepspeed.cli.main import main
from qa_deepspeed.inference import inputs
from qa_deepspeed.qa.features import example_store
from tests.unit.inference.test_answerer import CONTEXT, QUESTION, answerer
from tests.unit.inference.test_documents import folder_of_documents


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reader")
    answerer("bert").model.save_pretrained(folder)
    answerer("bert").tokenizer.save_pretrained(folder)
    return str(folder)


def predict(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["predict", *arguments])
    return int(ended.value.code or 0)


ROWS = [
    {"id": "first", "question": QUESTION, "context": CONTEXT},
    {"question": "What smiles?", "context": CONTEXT},
    {"id": "bad", "question": " ", "context": CONTEXT},
    {"id": 7, "question": "What smiles?", "context": CONTEXT[30:]},
]


def test_rows_of_a_file_are_answered_in_order(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in ROWS))
    assert predict(str(source), "--model_name_or_path", model, "--output", str(tmp_path / "out.jsonl")) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["first", "2", "7"]
    assert "1 empty question" in capsys.readouterr().err
    expected = answerer("bert")([ROWS[0], ROWS[1], ROWS[3]])
    assert [line["answer"] for line in lines] == [one["answer"] for one in expected]
    assert predict(str(source), "--model_name_or_path", model, "--top_k", "2") == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(line["answers"]) for line in shown] == [2, 2, 2]


def test_a_table_needs_no_ids_and_may_name_its_columns(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("asked", "text"), (QUESTION, CONTEXT)])
    pyarrow.parquet.write_table(pyarrow.table({"asked": [QUESTION], "text": [CONTEXT]}), tmp_path / "rows.parquet")
    wanted = answerer("bert")(QUESTION, CONTEXT)["answer"]
    for name in ("rows.csv", "rows.parquet"):
        columns = ("--question_column", "asked", "--context_column", "text")
        assert predict(str(tmp_path / name), "--model_name_or_path", model, *columns) == 0
        line = json.loads(capsys.readouterr().out)
        assert (line["id"], line["question"], line["answer"]) == ("1", QUESTION, wanted)
        assert predict(str(tmp_path / name), "--model_name_or_path", model) == 2
        assert "name it with --question_column" in capsys.readouterr().err


def test_a_squad_file_becomes_predictions_that_score_takes(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [{"text": "1874", "answer_start": CONTEXT.index("1874")}]
    questions = [{"id": str(n), "question": QUESTION, "answers": answers} for n in range(3)]
    gold = tmp_path / "gold.json"
    gold.write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": [{"context": CONTEXT, "qas": questions}]}]}))
    out = tmp_path / "predictions.json"
    assert predict(str(gold), "--model_name_or_path", model, "--output", str(out)) == 0
    assert list(json.loads(out.read_text())) == ["0", "1", "2"]
    with pytest.raises(SystemExit):
        main(["score", str(gold), str(out), "--json"])
    assert json.loads(capsys.readouterr().out)["total"] == 3


def test_one_question_and_standard_input(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ("--model_name_or_path", model, "--question", QUESTION, "--context", CONTEXT)
    assert predict(*one, "--n_best_size", "2", "--align_to_words", "false", "--handle_impossible_answer", "true") == 0
    line = json.loads(capsys.readouterr().out)
    wanted = answerer("bert")(QUESTION, CONTEXT, n_best_size=2, align_to_words=False, handle_impossible_answer=True)
    assert line["answer"] == wanted["answer"] and len(line["nbest"]) == 3
    text = json.dumps(ROWS[0]).encode()
    for given, status in ((text, 0), (text[:30], 2)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        assert predict("-", "--model_name_or_path", model) == status
    shown = capsys.readouterr()
    assert json.loads(shown.out)["id"] == "first" and "standard input: line 1" in shown.err


def test_one_question_about_the_documents_of_a_folder(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = folder_of_documents(tmp_path)
    asked = ("--model_name_or_path", model, "--question", QUESTION, "--documents", str(tmp_path))
    expected = answerer("bert")(QUESTION, contexts=texts, top_k=3, max_answer_len=4)
    for length in ("--max_answer_len", "--max_answer_length"):
        assert predict(*asked, "--top_k", "3", length, "4") == 0
        shown = capsys.readouterr()
        line = json.loads(shown.out)
        assert [(one["document"], one["answer"]) for one in line["answers"]] == [
            (one["document"], one["answer"]) for one in expected
        ]
        assert "answering with max_seq_length 384, doc_stride 128 (overlap), " in shown.err
        assert "max_answer_length 4, always an answer" in shown.err and "empty.txt: no text" in shown.err
    out = tmp_path / "answers.json"
    assert predict(*asked, "--max_answer_len", "4", "--output", str(out)) == 0
    assert json.loads(out.read_text()) == {"1": expected[0]["answer"]}
    everything = ("--null_score_diff_threshold", "-1000", "--version_2_with_negative")
    assert predict(*asked, *everything) == 0
    assert json.loads(capsys.readouterr().out)["document"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--question", "x", "--documents", "gone"], "gone: no such file"),
        (["--question", "x", "--documents", "gone", "--context", "y"], "with --context or --documents"),
        (["--documents", "gone"], "with --context or --documents"),
        (["--question", "x", "--documents", "setup.cfg"], "not a kind of document"),
        (["--question", "x", "--documents", "README.md", "--n_best_size", "2"], "--n_best_size is for one context"),
        (["--question", "x", "--documents", "README.md", "--output", "README.md"], "is the file that is read"),
        ([], "pass a file of questions"),
        (["--question", "x"], "pass a file of questions"),
        (["-", "--question", "x", "--context", "y"], "pass a file of questions"),
        (["nothing.json"], "no such file"),
        (["--question", " ", "--context", "y"], "nothing to answer"),
        (["--question", "x", "--context", "y", "--output", "no/where.json"], "there is no folder"),
        (["--question", "x", "--context", "y", "--output", "."], "it is a folder"),
        (["--question", "x", "--context", "y", "--output", "/proc/x.json"], "cannot write /proc/x.json"),
        (["--question", "x", "--context", "y", "--output", "/proc/x.jsonl"], "cannot write /proc/x.jsonl"),
        (["--question", "x", "--context", "y", "--device", "moon"], "there is no device"),
        (["--question", "x", "--context", "y", "--device", "meta"], "there is no device"),
        (["--question", "x", "--context", "y", "--dtype", "int9"], "there is no dtype"),
        (["--question", "x", "--context", "y", "--dtype", "int8"], "there is no dtype"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict("--model_name_or_path", model, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error


@pytest.mark.parametrize("kind", ["same", "symbolic link", "hard link"])
def test_the_input_is_not_overwritten(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    source, output = tmp_path / "rows.jsonl", tmp_path / "link.jsonl"
    source.write_text(json.dumps(ROWS[0]))
    if kind == "same":
        output = source
    elif kind == "symbolic link":
        output.symlink_to(source)
    else:
        output.hardlink_to(source)
    assert predict(str(source), "--model_name_or_path", model, "--output", str(output)) == 2
    assert "is the file that is read" in capsys.readouterr().err
    assert json.loads(source.read_text()) == ROWS[0]


def test_an_earlier_output_stays_until_the_new_one_is_complete(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that were made before the input turned out to be damaged are kept beside it."""
    monkeypatch.setattr(inputs, "QUESTIONS_AT_ONCE", 8)
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([*(json.dumps({**ROWS[0], "id": number}) for number in range(40)), "{"]))
    output.write_text("earlier")
    assert predict(str(source), "--model_name_or_path", model, "--batch_size", "1", "--output", str(output)) == 2
    assert output.read_text() == "earlier"
    partial = (tmp_path / "out.jsonl.partial").read_text().splitlines()
    assert [json.loads(line)["id"] for line in partial] == [str(number) for number in range(len(partial))]
    assert partial and f"kept in {output}.partial" in capsys.readouterr().err
    source.write_text(json.dumps(ROWS[0]))
    link = tmp_path / "link.jsonl"
    link.symlink_to(output)
    assert predict(str(source), "--model_name_or_path", model, "--output", str(link)) == 0
    assert link.is_symlink() and json.loads(output.read_text())["id"] == "first"


def test_questions_with_and_without_answers_in_several_shards(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example_store, "SMALL_SHARD", 1)
    source = tmp_path / "rows.json"
    answered = {"answers": [{"text": CONTEXT.split()[0], "answer_start": 0}]}
    source.write_text(json.dumps([{**ROWS[0], "id": n, **(answered if n % 2 else {})} for n in range(4)]))
    assert predict(str(source), "--model_name_or_path", model, "--output", str(tmp_path / "out.jsonl")) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4
