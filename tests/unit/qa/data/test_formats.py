"""Every format gives the same examples; a file that is not what its name says is one clear error with a place."""

import csv
import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qa_deepspeed.qa.data import formats, tables
from qa_deepspeed.qa.data.examples import Answer
from qa_deepspeed.qa.data.read_report import ReadReport, Reason
from qa_deepspeed.qa.data.reading import ColumnNames, DataSource, read_examples, resolve_files
from qa_deepspeed.utils.errors import UserError
from tests.paths import REPOSITORY
from tests.unit.qa.data.test_messages import names_a_way_out

CONTEXTS = [
    "Der Rhein entspringt\nin Graubünden, „wo er jung ist“ 😀.",
    'A "quoted", comma-ridden context, with a tab\there.',
    "東大寺は奈良にある。",
]
ANSWERS = ["Graubünden", "😀", "comma-ridden", "奈良", "「no」"]


def make_rows():
    rows = []
    for context in CONTEXTS:
        for answer in ANSWERS:
            start = context.find(answer)
            answers = {"text": [answer, answer], "answer_start": [start, start]} if start >= 0 else {}
            answers = answers or {"text": [], "answer_start": []}
            rows.append({"id": str(len(rows)), "context": context, "question": f"Where, {answer}?", "answers": answers})
    return rows


ROWS = make_rows()


def as_list_of_dicts(answers):
    return [{"text": text, "answer_start": start} for text, start in zip(*answers.values(), strict=True)]


def nested():
    paragraphs = []
    for context in CONTEXTS:
        asked = [{**row, "answers": as_list_of_dicts(row["answers"])} for row in ROWS if row["context"] == context]
        paragraphs.append({"context": context, "qas": asked})
    return [{"title": "one", "paragraphs": paragraphs[:1]}, {"title": "rest", "paragraphs": paragraphs[1:]}]


def dumps(value, **how):
    return json.dumps(value, ensure_ascii=False, **how).encode()


def lines(values):
    return b"".join(dumps(value) + b"\n" for value in values)


def csv_bytes(tmp_path, delimiter=",", render=json.dumps):
    path = tmp_path / "made.csv"
    with open(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, ["id", "context", "question", "answers"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows({**row, "answers": render(row["answers"])} for row in ROWS)
    return path.read_bytes()


def parquet_bytes(tmp_path, rows=None, **how):
    path = tmp_path / "made.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows or ROWS), path, **how)
    return path.read_bytes()


FILES = {
    "one_line.json": lambda _: dumps({"version": "v2.0", "data": nested()}),
    "indented.json": lambda _: dumps({"data": nested(), "version": "v2.0"}, indent=2),
    "windows.json": lambda _: b"\xef\xbb\xbf" + dumps({"data": nested()}, indent=2).replace(b"\n", b"\r\n"),
    "blank_lines_around.json": lambda _: b"\n\n" + dumps({"data": nested()}) + b"\n \n",
    "articles.json": lambda _: dumps(nested()),
    "rows.json": lambda _: dumps(ROWS),
    "rows_indented.json": lambda _: dumps(ROWS, indent=1),
    "rows_under_data.json": lambda _: dumps({"data": ROWS}),
    "rows.jsonl": lambda _: lines(ROWS),
    "rows_with_lists.jsonl": lambda _: lines({**row, "answers": as_list_of_dicts(row["answers"])} for row in ROWS),
    "lines_named.json": lambda _: lines(ROWS),
    "no_last_newline.jsonl": lambda _: b"\n" + lines(ROWS).rstrip(),
    "articles.jsonl": lambda _: lines(nested()),
    "no_suffix": lambda _: lines(ROWS),
    "rows.csv": csv_bytes,
    "rows_as_pandas_writes.csv": lambda folder: csv_bytes(folder, render=str),
    "rows_with_mark.csv": lambda folder: b"\xef\xbb\xbf" + csv_bytes(folder),
    "rows.tsv": lambda folder: csv_bytes(folder, "\t"),
    "rows.parquet": lambda folder: parquet_bytes(folder, row_group_size=4),
}


def read(*paths, purpose="train", version_2=True, **how):
    report = ReadReport()
    source = DataSource(tuple(map(str, paths)), purpose, version_2, **how)
    return list(read_examples(source, report)), report


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    path = tmp_path_factory.mktemp("expected") / "d.json"
    path.write_bytes(dumps({"data": nested()}))
    examples, _ = read(path)
    assert [one.example_id for one in examples] == [row["id"] for row in ROWS]
    assert sum(bool(one.answers) for one in examples) == 4
    return examples


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", FILES)
def test_all_formats_give_the_same_examples(tmp_path, expected, name, packed):
    content = FILES[name](tmp_path)
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(content) if packed else content)
    examples, report = read(path)
    assert examples == expected
    assert report.rejected == []
    for one, following in zip(examples, examples[1:], strict=False):
        assert (one.context is following.context) == (one.context == following.context)


@pytest.mark.parametrize("make", [lines, lambda rows: dumps(list(rows))], ids=["lines", "list"])
def test_mapped_columns(tmp_path, expected, make):
    columns = ColumnNames(id="key", question="q", context="text", answers="gold", is_impossible="none")
    renamed = [
        {"key": int(r["id"]), "q": r["question"], "text": r["context"], "gold": r["answers"], "id": None} for r in ROWS
    ]
    path = tmp_path / "d.jsonl"
    path.write_bytes(make(renamed))
    assert read(path, columns=columns)[0] == expected
    table = tmp_path / "d.parquet"
    table.write_bytes(parquet_bytes(tmp_path, [{k: v for k, v in row.items() if k != "id"} for row in renamed]))
    assert read(table, columns=columns)[0] == expected


@pytest.mark.parametrize(
    ("name", "place"),
    [("d.jsonl", "line 3"), ("d.json", "line 3"), ("d.csv", "line 4"), ("d.parquet", "row 3")],
)
def test_a_rejected_flat_row_is_listed_with_its_place(tmp_path, name, place):
    rows = [{**row, "answers": {"text": ["?"], "answer_start": [0]}} if row["id"] == "2" else row for row in ROWS[:5]]
    rows[0] = {**rows[0], "context": rows[0]["context"].replace("\n", " ")}
    path = tmp_path / name
    if name.endswith("csv"):
        with open(path, "w", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(rows[0])
            writer.writerows(
                [row["id"], row["context"].replace("\n", " "), row["question"], json.dumps(row["answers"])]
                for row in rows
            )
    else:
        path.write_bytes(parquet_bytes(tmp_path, rows) if name.endswith("parquet") else lines(rows))
    _, report = read(path)
    assert [(one.example_id, one.where, one.reason) for one in report.rejected] == [
        ("2", f"{path}: {place}", Reason.TEXT_ABSENT)
    ]


def test_cells_of_csv_files(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text(
        "id,context,question,answers,is_impossible\n"
        "1,1867 in Warsaw,When?,\"{'text': ['1867'], 'answer_start': [0]}\",False\n"
        '2,1867 in Warsaw,Where?,"[{""text"": ""Warsaw"", ""answer_start"": 8.0}]",\n'
        "3,1867 in Warsaw,Who?,,True\n"
        "4,1867 in Warsaw,Why?,,\n"
        "5,1867 in Warsaw,Which?,Warsaw,\n"
        "6,1867 in Warsaw\n"
    )
    examples, report = read(path)
    assert [one.answers for one in examples] == [(Answer("1867", 0),), (Answer("Warsaw", 8),), (), ()]
    assert report.rejected_by_reason == {Reason.BAD_ANSWER_LIST: 1, Reason.NO_QUESTION: 1}


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.parquet"])
def test_a_table_without_a_column_says_which_flag_names_it(tmp_path, name):
    path = tmp_path / name
    if name == "d.parquet":
        path.write_bytes(parquet_bytes(tmp_path, [{"id": "1", "question": "?", "body": "x"}]))
    else:
        path.write_text("id,question,body\n1,?,x\n".replace(",", "\t" if name == "d.tsv" else ","))
    with pytest.raises(UserError, match="no column 'context' .* id, question, body; name it with --context_column"):
        read(path)


NOT_DATA = {
    "empty.json": (b"", "the file is empty"),
    "blank.jsonl": (b" \n\n", "the file is empty"),
    "empty.csv": (b"", "the file is empty"),
    "empty.parquet": (b"", "not Parquet, or damaged"),
    "number.json": (b"3", "not question-answering data"),
    "null.json": (b"null", "not question-answering data"),
    "no_list.json": (b'{"data": {"paragraphs": []}}', "not question-answering data"),
    "cut.json": (b'{"data": [\n{"paragraphs": [{"con', r"line 2, column \d+: not JSON: .*"),
    "cut_between.json": (b'{"data": [\n{"paragraphs": [', r"line 2, column \d+: not JSON: .* truncated"),
    "cut_line.jsonl": (lines(ROWS[:3])[:-9], r"line 3, column \d+: not JSON: "),
    "comma.json": (b'{"data": [\n\n1,,2]}', "line 3, column 3: not JSON"),
    "two.json": (b'{"data": []}{', "line 1, column 13: not JSON: Extra data"),
    "latin1.json": ('{"data":\n[ "Graubünden"]}'.encode("latin-1"), "line 2, byte 9: not UTF-8"),
    "latin1.jsonl": (b'{"id": 1}\n{"id": "\xfc"}\n', "line 2, byte 9: not UTF-8"),
    "latin1.csv": ("id,question,context\n1,ü,c\n".encode("latin-1"), "not UTF-8"),
    "utf16.json": ('{"data": []}'.encode("utf-16")[2:], "not JSON|not UTF-8"),
    "deep.json": (b"[" * 200_000, "nested too deeply"),
    "huge_number.json": (b'{"data": [' + b"9" * 5000 + b"]}", "not JSON: Exceeds the limit"),
    "open_quote.csv": (
        b'id,question,context\n1,?,"never closed\n',
        "line 2: a cell of the row that begins there has a quotation",
    ),
    "text.parquet": (b"id,question,context\n" * 9, "not Parquet, or damaged"),
}


@pytest.mark.parametrize("name", NOT_DATA)
def test_an_unreadable_file_is_one_line_that_names_file_and_place(tmp_path, name):
    content, message = NOT_DATA[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert names_a_way_out(str(caught.value))


@pytest.mark.parametrize(
    ("name", "make", "line"),
    [
        ("one.json", lambda row: dumps([row]), 1),
        ("pretty.json", lambda row: b"[\n" + dumps(row, indent=2) + b"]", 1),
        ("rows.jsonl", lambda row: lines([ROWS[0]]) + b"\n" + dumps(row), 3),
        ("rows.csv", lambda row: b"id,question,context\n0,q,c\n1,q," + row["context"].encode(), 3),
    ],
)
def test_a_record_longer_than_the_limit_is_one_line(tmp_path, monkeypatch, name, make, line):
    """A compressed file of some megabytes can hold one line of gigabytes."""
    for module in (formats, tables):
        monkeypatch.setattr(module, "RECORD_LIMIT", 10_000)
    (tmp_path / name).write_bytes(gzip.compress(make({**ROWS[0], "context": "a" * 10_001})))
    with pytest.raises(UserError, match=f"{name}: line {line}: more than .* in one line or document"):
        read(tmp_path / name, purpose="evaluate")
    (tmp_path / name).write_bytes(gzip.compress(make({**ROWS[1], "context": "a" * 9_000})))
    assert read(tmp_path / name, purpose="evaluate")[0][-1].context == "a" * 9_000


def test_a_parquet_row_with_a_time_that_python_has_not_is_rejected(tmp_path):
    rows = ROWS[:3]
    table = pyarrow.Table.from_pylist(rows)
    times = pyarrow.array([None, 2**60, None], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(table.append_column("is_impossible", times), tmp_path / "times.parquet")
    report = ReadReport()
    source = DataSource((str(tmp_path / "times.parquet"),), "evaluate", True)
    assert len(list(read_examples(source, report))) == 2
    (rejected,) = report.rejected
    assert rejected.where.endswith("row 2")


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: a folder"):
        read(tmp_path)
    for path in (tmp_path / "absent.json", tmp_path / "absent.parquet"):
        with pytest.raises(UserError, match=f"{path}: cannot be read"):
            read(path)
    damaged = tmp_path / "d.json.gz"
    packed = gzip.compress(dumps({"data": nested()}))
    for content in (packed[:-20], packed[:40] + b"xxxx" + packed[44:], packed[:3]):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match="compressed data are truncated or damaged"):
            read(damaged)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.sampled_from(sorted(FILES)), share=st.floats(0, 1), packed=st.booleans())
def test_a_file_truncated_anywhere_is_a_user_error_or_the_rows_before(tmp_path, expected, name, share, packed):
    content = FILES[name](tmp_path)
    content = gzip.compress(content) if packed else content
    path = tmp_path / f"cut_{name}"
    path.write_bytes(content[: int(share * len(content))])
    try:
        examples, _ = read(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    else:
        whole = path.read_bytes() == content or not content[path.stat().st_size :].strip()
        # Formats of lines can end between two rows without a sign of it, and a last row of CSV may lack its end.
        of_lines = name.endswith((".jsonl", ".csv", ".tsv")) or name in ("no_suffix", "lines_named.json")
        by_rows = of_lines and not packed
        assert whole or by_rows
        assert [one.example_id for one in examples] == [one.example_id for one in expected[: len(examples)]]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "data",
                        "version",
                        "paragraphs",
                        "context",
                        "qas",
                        "id",
                        "question",
                        "answers",
                        "text",
                        "answer_start",
                        "is_impossible",
                    ]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=30,
    ),
    purpose=st.sampled_from(["train", "evaluate"]),
    version_2=st.booleans(),
    in_article=st.booleans(),
)
def test_any_json_at_all_gives_examples_or_a_user_error(tmp_path, value, purpose, version_2, in_article):
    path = tmp_path / "any.json"
    document = {"data": [{"paragraphs": [{"context": "some text", "qas": [value]}]}]} if in_article else value
    path.write_text(json.dumps(document), encoding="utf-8")
    try:
        examples, report = read(path, purpose=purpose, version_2=version_2)
    except UserError:
        return
    assert len(examples) == report.usable > 0
    assert all(one.example_id and one.question.strip() for one in examples)


def test_files_are_found_by_patterns_in_order_and_once(tmp_path):
    for name in ("b.json", "a.json", "c[1].json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "d.json").mkdir()
    found = resolve_files([str(tmp_path / "c[1].json"), str(tmp_path / "*.json"), str(tmp_path / "a.json")])
    assert [path.rsplit("/", 1)[1] for path in found] == ["c[1].json", "a.json", "b.json"]
    assert DataSource.resolve(str(tmp_path / "a.json")) == (str(tmp_path / "a.json"),)
    with pytest.raises(UserError, match="x\\*.json: no such file"):
        resolve_files([str(tmp_path / "x*.json")])


def test_several_files_are_read_in_order(tmp_path, expected):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    first.write_bytes(lines(ROWS[:6]))
    second.write_bytes(parquet_bytes(tmp_path, ROWS[6:]))
    assert read(first, second)[0] == expected


MEASURE_MEMORY = """
import re, sys
from qa_deepspeed.qa.data.reading import DataSource, ReadReport, read_examples
def anonymous_kilobytes():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
examples = read_examples(DataSource((sys.argv[1],), "train", False), ReadReport())
next(examples)
before = anonymous_kilobytes()
count = 1 + sum(1 for _ in examples)
print(count, anonymous_kilobytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_reading_json_lines_takes_the_memory_of_the_id_hashes_only(tmp_path, packed):
    path = tmp_path / "d.jsonl"
    rows, padding = 60_000, "long context " * 100
    with gzip.open(path, "wb", 1) if packed else open(path, "wb") as handle:
        for number in range(rows):
            answers = {"text": ["long"], "answer_start": [len(str(number)) + 1]}
            handle.write(dumps({"id": number, "context": f"{number} {padding}", "question": "?", "answers": answers}))
            handle.write(b"\n")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, str(path)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    count, grown_kilobytes = map(int, done.stdout.split())
    assert count == rows
    # The contexts are 80 MB; the table of hashes takes 1 MB while it is doubled.
    assert grown_kilobytes < 8_000
