"""Files of other programs give the questions that they hold."""

from __future__ import annotations

import bz2
import csv
import io
import json
import lzma
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.data.read_report import ReadReport, Reason
from qa_deepspeed.qa.data.reading import ColumnNames, DataSource, read_examples
from qa_deepspeed.utils.errors import UserError
from tests.paths import SHARED
from tests.unit.qa.data.test_messages import names_a_way_out

CONTEXT = "The kiln was built in 1871 by Ida Brook. It fired roof tiles."
FOUND = [("Who built it?", "Ida Brook", 30), ("When?", "1871", 22)]


def read(path: Path, purpose: Any = "train", version_2: bool = False, **more: Any) -> tuple[list[Example], ReadReport]:
    report = ReadReport()
    return list(read_examples(DataSource((str(path),), purpose, version_2, **more), report)), report


def as_found(examples: list[Example]) -> list[tuple[str, str, int]]:
    assert all(one.context == CONTEXT for one in examples)
    return [(one.question, one.answers[0].text, one.answers[0].start) for one in examples]


def mrqa(question: str, text: str, start: int) -> dict[str, Any]:
    spans = [[start, start + len(text) - 1]]
    return {"id": "same", "qid": text, "question": question, "answers": [text, "other"],
            "detected_answers": [{"text": text, "char_spans": spans, "token_spans": [[0, 0]]}]}  # fmt: skip


def rows(**names: str) -> list[dict[str, Any]]:
    """Flat rows under other names of the columns."""
    return [
        {
            "id": str(number),
            names.get("question", "question"): question,
            names.get("context", "context"): CONTEXT,
            names.get("text", "answer_text"): text,
            names.get("start", "answer_start"): start,
        }
        for number, (question, text, start) in enumerate(FOUND)
    ]


def spans(question: str, text: str, start: int) -> dict[str, Any]:
    return {"start": start, "end": start + len(text), "text": text, "labels": ["Answer"]}


DOCUMENTS: dict[str, Any] = {
    "korquad 2": {
        "data": [
            {"context": CONTEXT, "qas": [{"id": t, "question": q, "answer": {"text": t, "answer_start": s}}]}
            for q, t, s in FOUND
        ]
    },
    "label studio, minimal": [
        {"id": n, "text": CONTEXT, "question": one[0], "answer": [spans(*one)]} for n, one in enumerate(FOUND)
    ],
    "label studio, full": [
        {"id": n, "data": {"text": CONTEXT, "question": one[0]}, "annotations": [{"result": [{"value": spans(*one)}]}]}
        for n, one in enumerate(FOUND)
    ],
    "doccano": [
        {"id": n, "text": CONTEXT, "question": q, "label": [[s, s + len(t), "Answer"]]}
        for n, (q, t, s) in enumerate(FOUND)
    ],
    "dpr": [{"question": q, "answers": [t], "positive_ctxs": [{"title": "x", "text": CONTEXT}]} for q, t, s in FOUND],
    "flat, text and start": rows(),
    "flat, other names": rows(text="answer", start="start", context="document"),
    "starts as text": [{**row, "answer_start": str(row["answer_start"])} for row in rows()],
    "starts as floats in text": [{**row, "answer_start": f"{row['answer_start']}.0"} for row in rows()],
    "unknown starts": [{**row, "answer_start": -1} for row in rows()],
    "no starts": [{"id": t, "question": q, "context": CONTEXT, "answers": [{"text": t}]} for q, t, _ in FOUND],
    "texts alone": [{"id": t, "question": q, "context": CONTEXT, "answers": [t]} for q, t, _ in FOUND],
    "one split": {"train": rows()},
    "columns of pandas": {
        name: {str(number): row[name] for number, row in enumerate(rows())} for name in rows()[0]
    },
    "rows of pandas": {str(number): row for number, row in enumerate(rows())},
    "split of pandas": {"columns": list(rows()[0]), "index": [0, 1], "data": [list(row.values()) for row in rows()]},
    "columns as lists": {name: [row[name] for row in rows()] for name in rows()[0]},
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_layouts_of_json(tmp_path: Path, name: str, purpose: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps(DOCUMENTS[name]))
    examples, report = read(path, purpose)
    assert as_found(examples) == FOUND and report.rejected == []


def test_mrqa_lines(tmp_path: Path) -> None:
    """The span's end is included, the qid is the id, and texts that were not detected count in evaluations."""
    path = tmp_path / "d.jsonl"
    entry = {"context": CONTEXT, "qas": [mrqa(*one) for one in FOUND]}
    path.write_text("\n".join(json.dumps(one) for one in ({"header": {"dataset": "x"}}, entry)))
    examples, _ = read(path)
    assert as_found(examples) == FOUND and [one.example_id for one in examples] == ["Ida Brook", "1871"]
    examples, _ = read(path, "evaluate")
    assert [answer.text for answer in examples[0].answers] == ["Ida Brook", "other"]


@pytest.mark.parametrize(
    ("names", "purpose", "taken"),
    [
        (("train", "validation"), "train", "train"),
        (("train", "validation"), "evaluate", "validation"),
        (("Train", "dev", "test"), "train", "Train"),
        (("Train", "dev", "test"), "evaluate", "dev"),
        (("train", "test"), "evaluate", "test"),
        (("train", "validation", "dev"), "evaluate", None),
        (("one", "other"), "train", None),
        (("validation", "test"), "train", None),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_split_is_read_by_its_purpose(
    tmp_path: Path, names: tuple[str, ...], purpose: str, taken: str | None, nested: bool
) -> None:
    path = tmp_path / "d.json"
    made = {name: [{**row, "question": f"{row['question']} {name}"} for row in rows()] for name in names}
    path.write_text(json.dumps({name: {"data": one} for name, one in made.items()} if nested else made))
    if taken is None:
        with pytest.raises(UserError, match=f"holds the splits {', '.join(names)}, and which") as caught:
            read(path, purpose)
        assert names_a_way_out(str(caught.value))
        return
    examples, report = read(path, purpose)
    assert [one.question for one in examples] == [f"{question} {taken}" for question, _, _ in FOUND]
    assert report.notes == [f"d.json: holds the splits {', '.join(names)}: {taken} is read to {purpose} on"]


def test_the_held_out_part_of_a_file_of_splits_is_of_the_training_split(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    contexts = [f"Answer {number} is here." for number in range(40)]
    made = [
        {"id": text, "question": "?", "context": text, "answers": [{"text": "Answer", "answer_start": 0}]}
        for text in contexts
    ]
    path.write_text(json.dumps({"train": made, "test": rows()}))
    parts = [read(path, purpose, validation=(0.3, 1))[0] for purpose in ("train", "evaluate")]
    assert sorted(one.context for part in parts for one in part) == sorted(contexts) and all(parts)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("blanks", [False, True])
def test_tables(tmp_path: Path, delimiter: str, encoding: str, blanks: bool) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows()[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows())
    content = text.getvalue()
    if blanks:
        header, rest = content.split("\r\n", 1)
        content = f"{header.replace(delimiter, f'{delimiter} ')}\r\n{rest}"
    path = tmp_path / "d.csv"
    path.write_bytes(content.encode(encoding))
    examples, _ = read(path)
    assert as_found(examples) == FOUND
    path.with_suffix(".csv.bz2").write_bytes(bz2.compress(content.encode(encoding)))
    path.with_suffix(".csv.xz").write_bytes(lzma.compress(content.encode(encoding)))
    for packed in (".csv.bz2", ".csv.xz"):
        assert as_found(read(path.with_suffix(packed))[0]) == FOUND


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "cp1252"])
@pytest.mark.parametrize("lines", [False, True])
def test_json_of_other_encodings(tmp_path: Path, encoding: str, lines: bool) -> None:
    made = [{**row, "context": CONTEXT.replace("Ida", "Ída")} for row in rows()]
    made[0]["answer_text"] = "Ída Brook"
    text = (
        "\n".join(json.dumps(one, ensure_ascii=False) for one in made)
        if lines
        else json.dumps(made, ensure_ascii=False)
    )
    path = tmp_path / "d.json"
    path.write_bytes(text.encode(encoding))
    examples, _ = read(path, encoding="cp1252" if encoding == "cp1252" else None)
    assert [one.answers[0].text for one in examples] == ["Ída Brook", "1871"]
    if encoding == "cp1252":
        with pytest.raises(UserError, match="--encoding cp1252"):
            read(path)
    for unknown in ("klingon", "rot13", "a\0b"):
        with pytest.raises(UserError, match=f"encoding {unknown} is unknown"):
            read(path, encoding=unknown)


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "utf-16-le", "utf-32-be"])
def test_a_mark_before_the_header_is_no_part_of_it_when_the_encoding_is_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(("\ufeff" + as_csv(rows())).encode(encoding))
    examples, report = read(path, encoding=encoding)
    assert as_found(examples) == FOUND and report.ids_made == 0


def as_csv(made: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(made[0]))
    writer.writeheader()
    writer.writerows(made)
    return text.getvalue()


@pytest.mark.parametrize("name", ["answer", "label"])
def test_span_labels_in_the_cells_of_a_table(tmp_path: Path, name: str) -> None:
    """Label Studio's CSV export: JSON in the cells, spans with start, end and text."""
    made = [{"id": q, "text": CONTEXT, "question": q, name: json.dumps([spans(q, t, s)])} for q, t, s in FOUND]
    path = tmp_path / "d.csv"
    path.write_text(as_csv(made))
    assert as_found(read(path)[0]) == FOUND


def test_headers_are_found_in_other_spellings(tmp_path: Path) -> None:
    """Upper case and blanks; a column of the very name comes first."""
    names = {"id": "ID", "question": "Question", "context": "CONTEXT", "answer_text": "Answer Text",
             "answer_start": "answer-start"}  # fmt: skip
    path = tmp_path / "d.csv"
    path.write_text(as_csv([{names[key]: value for key, value in row.items()} for row in rows()]))
    examples, report = read(path)
    assert as_found(examples) == FOUND and report.ids_made == 0
    path.write_text(as_csv([{"Question": "x", **row} for row in rows()]))
    assert as_found(read(path)[0]) == FOUND
    path.write_text(
        as_csv([{names.get(key, key): value for key, value in row.items()} | {"QUESTION": "x"} for row in rows()])
    )
    with pytest.raises(UserError, match="no column 'question' for the question among id, Question, context, "):
        read(path)


def test_cells_without_a_column_reject_their_row(tmp_path: Path) -> None:
    """A comma without quotes would cut a context, and shift the cells after it."""
    path = tmp_path / "d.csv"
    path.write_text("id,question,context\na,Who?,The kiln, built in 1871\nb,Who?,The kiln,\n")
    examples, report = read(path, "evaluate")
    assert [one.example_id for one in examples] == ["b"]
    assert [(one.example_id, one.reason) for one in report.rejected] == [("a", Reason.TOO_MANY_CELLS)]


def test_a_column_that_occurs_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("id,question,context,note,note,context\na,Who?,one,x,y,two\n")
    with pytest.raises(UserError, match="the column 'context' occurs twice"):
        read(path, "evaluate")


@pytest.mark.parametrize("nothing", [float("nan"), None])
def test_what_pandas_writes_for_nothing_is_no_answer(tmp_path: Path, nothing: Any) -> None:
    path = tmp_path / "d.json"
    empty = {"id": "x", "question": "Why?", "context": "nan", "is_impossible": nothing}
    path.write_text(json.dumps([*rows(), {**empty, "answer_text": nothing, "answer_start": nothing}]))
    examples, report = read(path, "evaluate", version_2=True)
    assert not examples[2].has_gold and report.answer_faults == {}
    assert [one.reason for one in read(path, version_2=True)[1].rejected] == [Reason.NO_ANSWER_LIST]


def test_blank_cells_of_a_table_say_nothing(tmp_path: Path) -> None:
    """A blank start is unknown; a question with blank answer and is_impossible is not scored."""
    made = [{**row, "answer_start": "", "is_impossible": "false"} for row in rows()]
    blank = {**made[0], "id": "x", "question": "Why?", "answer_text": "", "is_impossible": ""}
    path = tmp_path / "d.csv"
    path.write_text(as_csv([*made, blank, {**blank, "id": "y", "is_impossible": "True"}]))
    examples, report = read(path, "evaluate", version_2=True)
    assert as_found(examples[:2]) == FOUND and report.answer_faults == {}
    assert [one.has_gold for one in examples] == [True, True, False, True] and report.unanswerable == 1


def test_named_columns_of_text_and_start(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps(rows(text="gold", start="where")))
    examples, _ = read(path, columns=ColumnNames(answer_text="gold", answer_start="where"))
    assert as_found(examples) == FOUND


def test_arrays_of_numpy_in_cells(tmp_path: Path) -> None:
    """As `Dataset.to_csv` writes them, also over several lines; nothing in a cell is called."""
    cells = [repr({"text": np.array([t], dtype=object), "answer_start": np.array([s])}) for _, t, s in FOUND]
    cells[0] = cells[0].replace(", dtype", ",\n      dtype")
    path = tmp_path / "d.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "question", "context", "answers"])
        writer.writerows([t, q, CONTEXT, cell] for (q, t, _), cell in zip(FOUND, cells, strict=True))
        writer.writerow(["x", "?", CONTEXT, "{'text': print('called')}"])
    examples, report = read(path)
    assert as_found(examples) == FOUND and [one.example_id for one in report.rejected] == ["x"]


def test_ids_are_made_where_there_are_none(tmp_path: Path) -> None:
    made = [{key: value for key, value in row.items() if key != "id"} for row in rows()]
    path, again = tmp_path / "d.json", tmp_path / "e.csv"
    path.write_text(json.dumps(made))
    with again.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(made[0]))
        writer.writeheader()
        writer.writerows(made)
    examples, report = read(path)
    assert report.ids_made == 2 and "2 without an id got one" in report.summary()
    assert len({one.example_id for one in examples}) == 2
    assert [one.example_id for one in read(again)[0]] == [one.example_id for one in examples]


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC"])
def test_other_unicode_forms_are_slices_of_the_context(tmp_path: Path, form: str) -> None:
    context = unicodedata.normalize("NFD" if form == "NFC" else "NFC", "Über dem Tor: Größe\u00a05 m, Émile.")
    path = tmp_path / "d.json"
    made = []
    for number, text in enumerate(("Über dem", "Größe\u00a05", "Émile")):
        place = unicodedata.normalize("NFKC", context).index(unicodedata.normalize("NFKC", text))
        answer = {"text": unicodedata.normalize(form, text), "answer_start": place}
        made.append({"id": number, "question": "?", "context": context, "answers": [answer]})
    path.write_text(json.dumps(made))
    examples, report = read(path)
    assert report.rejected == []
    for one, text in zip(examples, ("Über dem", "Größe\u00a05", "Émile"), strict=True):
        (answer,) = one.answers
        assert context[answer.start :].startswith(answer.text)
        assert unicodedata.normalize("NFKC", answer.text) == unicodedata.normalize("NFKC", text)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_hangul_syllables_and_their_letters_are_one_text(tmp_path: Path, forms: tuple[str, str]) -> None:
    context, text = (
        unicodedata.normalize(form, one) for form, one in zip(forms, ("서울에 하나, 한국에 둘.", "한국"), strict=True)
    )
    path = tmp_path / "d.json"
    answer = {"text": text, "answer_start": 8}
    part = {"text": unicodedata.normalize(forms[1], "구"), "answer_start": 9}  # begins the syllable 국 and is no part
    made = [{"id": n, "question": "?", "context": context, "answers": [one]} for n, one in enumerate((answer, part))]
    path.write_text(json.dumps(made))
    (found,), report = read(path)
    assert found.answers == (
        Answer(unicodedata.normalize(forms[0], "한국"), context.index(unicodedata.normalize(forms[0], "한국"))),
    )
    assert [one.example_id for one in report.rejected] == ["1"]


OTHERS = {
    "d.json.zst": (b"\x28\xb5\x2f\xfd\x00", "compressed by Zstandard: unpack it"),
    "d.zip": (b"PK\x03\x04rest", "zip archive or an Excel workbook"),
    "d.json.xlsx": (b"PK\x03\x04rest", "save the sheet as CSV"),
    "d.arrow": (b"ARROW1\x00\x00", "an Arrow file"),
    "d.pkl": (b"\x80\x04\x95\x00", "a pickle, which could run any program"),
    "d.json": (b"%PDF-1.7", "a PDF file"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_files_are_named(tmp_path: Path, name: str) -> None:
    content, message = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert names_a_way_out(str(caught.value))


def test_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a folder, not a file.*to_parquet"):
        read(tmp_path)


CASES = {
    "utf16.json": 7,
    "emoji_utf16.json": 24,
    "crlf_shift.json": 20,
    "mrqa.jsonl.gz": 2,
    "flat_answers.csv": 2,
    "hf_real_to_csv.csv": 7,
    "korquad2.json": 7,
    "labelstudio_min.json": 7,
    "cdqa_noids.json": 7,
    "no_id.jsonl": 2,
    "cdqa_minus1.json": 7,
    "start_as_text.json": 7,
    "excel_semicolon.csv": 7,
    "header_blanks.csv": 7,
}
"""Questions of each small file that users of other programs brought."""


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    path = SHARED / "cases" / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    examples, report = read(path, version_2=True)
    assert len(examples) == CASES[name] and report.rejected == []
    assert report.repaired == (7 if name == "cdqa_minus1.json" else 0)
    for one in examples:
        for answer in one.answers:
            assert one.context[answer.start :].startswith(answer.text)
            assert answer != Answer("", 0)
