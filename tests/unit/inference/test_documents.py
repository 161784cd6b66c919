"""One question and many documents: the best of the answers in each alone, ranked by null odds."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from qa_deepspeed.inference import documents
from qa_deepspeed.inference.documents import document_files, read_documents
from qa_deepspeed.qa.data.layouts import ColumnNames
from qa_deepspeed.utils.errors import UserError
from tests.unit.inference.test_answerer import CONTEXT, QUESTION, SIZES, answerer

TEXTS = {
    "whole": CONTEXT,
    "tail": CONTEXT[40:],
    "long": " ".join([CONTEXT] * 6),
    "short": "A lady of Weimar wrote it.",
    "other": "The Rhine rises in Graubünden.",
}


def alone(name: str, question: str = QUESTION, **more: Any) -> list[dict[str, Any]]:
    """The answer in each document by a call of its own, best first."""
    found = []
    for document, text in TEXTS.items():
        one = answerer(name)(question=question, context=text, n_best_size=1, handle_impossible_answer=False, **more)
        found.append({**one, "document": document})
    return sorted(found, key=lambda one: one["null_odds"])


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [(one["document"], one["answer"], one["start"], one["end"]) for one in found] == [
        (one["document"], one["answer"], one["start"], one["end"]) for one in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert one["null_odds"] == pytest.approx(other["null_odds"], abs=1e-4)
        assert one["score"] == pytest.approx(1 / (1 + math.exp(other["null_odds"])), abs=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_the_best_of_all_documents_is_the_best_of_each_alone(name: str) -> None:
    expected = alone(name, max_seq_len=60, doc_stride=20)
    found = answerer(name)(QUESTION, contexts=TEXTS, top_k=9, max_seq_len=60, doc_stride=20)
    assert_same(found, expected)
    best = answerer(name)(question=QUESTION, contexts=TEXTS, max_seq_len=60, doc_stride=20)
    assert_same([best], expected[:1])
    assert TEXTS[best["document"]][best["start"] : best["end"]] == best["answer"]


def test_documents_are_answered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any number of documents only the best answers are held."""
    expected = answerer("bert")(QUESTION, contexts=TEXTS, top_k=2)
    monkeypatch.setattr(documents, "QUESTIONS_AT_ONCE", 2)
    assert_same(answerer("bert")(QUESTION, contexts=iter(TEXTS.items()), top_k=2), expected)


def test_documents_without_names_are_numbered_and_blank_ones_left_out() -> None:
    texts = [" \n", *TEXTS.values()]
    found = answerer("bert")(QUESTION, contexts=texts, top_k=9)
    names = dict(enumerate(texts))
    assert len(found) == len(TEXTS) and {names[one["document"]] for one in found} == set(TEXTS.values())


def test_several_questions_are_answered_from_the_same_documents() -> None:
    questions = [QUESTION, "Where does the Rhine rise?"]
    found = answerer("bert")(question=questions, contexts=iter(TEXTS.items()))
    for one, question in zip(found, questions, strict=True):
        assert_same([one], alone("bert", question)[:1])


def test_no_answer_comes_before_the_documents_above_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    one = answerer("bert")
    found = one(QUESTION, contexts=TEXTS, top_k=9)
    odds = [answer["null_odds"] for answer in found]
    for place in range(len(odds) + 1):
        below, above = odds[place - 1] if place else odds[0] - 2, odds[place] if place < len(odds) else odds[-1] + 2
        monkeypatch.setattr(one, "threshold", (below + above) / 2)
        answers = one(QUESTION, contexts=TEXTS, top_k=9)
        assert [answer["document"] for answer in answers].index(None) == place
        assert answers[place]["answer"] == "" and answers[place]["score"] == pytest.approx(1 - found[0]["score"])
        assert one(QUESTION, contexts=TEXTS)["answer"] == ("" if place == 0 else found[0]["answer"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": QUESTION, "contexts": []}, "there is no document"),
        ({"question": QUESTION, "contexts": "x"}, "pass one text as context="),
        ({"question": QUESTION, "contexts": ["x", 3]}, "document 1 is a int, not a text"),
        ({"question": " ", "contexts": ["x"]}, "pass question="),
        ({"contexts": ["x"]}, "pass question="),
        ({"question": QUESTION, "contexts": ["x"], "context": "y"}, "leave out context and n_best_size"),
        ({"question": QUESTION, "contexts": ["x"], "n_best_size": 2}, "leave out context and n_best_size"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        answerer("bert")(**arguments)


def folder_of_documents(folder: Path) -> dict[str, str]:
    """A folder with documents of all kinds; the texts by name."""
    (folder / "deep" / ".hidden").mkdir(parents=True)
    (folder / "a.txt").write_text(TEXTS["whole"])
    (folder / "deep" / "b.md").write_bytes("\ufeff".encode() + TEXTS["tail"].encode())
    (folder / "deep" / "empty.txt").write_text("\n")
    (folder / "picture.png").write_bytes(b"PNG")
    (folder / "deep" / ".hidden" / "c.txt").write_text("hidden")
    (folder / "rows.jsonl").write_text(json.dumps({"id": 7, "text": TEXTS["short"]}) + "\n" + json.dumps({"no": 1}))
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text",), (TEXTS["other"],)])
    squad = {"data": [{"paragraphs": [{"context": TEXTS["long"], "qas": []}]}]}
    (folder / "squad.json").write_text(json.dumps(squad))
    return {
        str(folder / "a.txt"): TEXTS["whole"],
        str(folder / "deep" / "b.md"): TEXTS["tail"],
        f"{folder / 'rows.csv'}: line 2": TEXTS["other"],
        "7": TEXTS["short"],
        f"{folder / 'squad.json'}: data[0].paragraphs[0]": TEXTS["long"],
    }


def test_documents_of_a_folder(tmp_path: Path) -> None:
    expected, left_out = folder_of_documents(tmp_path), []
    files = document_files([str(tmp_path), str(tmp_path / "a.txt"), str(tmp_path / "*.csv")])
    assert dict(read_documents(files, ColumnNames(), None, left_out.append)) == expected
    assert len(files) == 6 and [line.rsplit(": ", 2)[-2:] for line in left_out] == [
        [str(tmp_path / "deep" / "empty.txt"), "no text"],
        ["no text", "name its column with --context_column"],
    ]


def test_columns_and_encodings_of_documents(tmp_path: Path) -> None:
    path, text = tmp_path / "d.csv", tmp_path / "d.txt"
    path.write_bytes("key;body\nx;Größe\n".encode("cp1252"))
    text.write_bytes("Größe".encode("cp1252"))
    columns = ColumnNames(id="key", context="body")
    found = read_documents([str(path), str(text)], columns, "cp1252", print)
    assert list(found) == [("x", "Größe"), (str(text), "Größe")]
    with pytest.raises(UserError, match="d.txt: not UTF-8 text .*--encoding"):
        list(read_documents([str(text)], columns, None, print))
    with pytest.raises(UserError, match="no column 'context' for the context .* name it with --context_column"):
        list(read_documents([str(path)], ColumnNames(), "cp1252", print))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["gone.txt"], "no such file"),
        (["empty"], "the folder holds no documents"),
        (["x.pdf"], "not a kind of document"),
    ],
)
def test_paths_that_are_no_documents(tmp_path: Path, names: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.pdf").touch()
    with pytest.raises(UserError, match=message):
        document_files([str(tmp_path / name) for name in names])
