"""The `score` sub-command on real and on broken files."""

import csv
import gzip
import json
import subprocess
import sys

import pytest

from qa_deepspeed.cli.main import main
from tests.paths import DATA, REPOSITORY, needs_real_data


def article(*questions, context="The Rhine is long.", **more):
    return {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(questions)}]}], **more}


def question(example_id, *answers, **more):
    return {"id": example_id, "question": "?", "answers": [{"text": a, "answer_start": 0} for a in answers], **more}


@pytest.fixture
def files(tmp_path):
    """Write values as JSON files (text as it is) and give their paths."""

    def write(**values):
        paths = []
        for name, value in values.items():
            path = tmp_path / f"{name}.json"
            path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
            paths.append(str(path))
        return paths

    return write


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["score", *arguments])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def metrics_of(capsys, *arguments):
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    return json.loads(out), err


V2 = article(question("a", "Rhine"), question("b", is_impossible=True), version="v2.0")


def test_v1_or_v2_by_what_the_file_says(capsys, files):
    for gold, second in (
        (article(question("a", "Rhine", "the Rhine"), question("b", "long"), version="1.1"), False),
        (V2, True),
        (article(question("a", "Rhine"), question("b", is_impossible=True)), True),
        (article(question("a", "Rhine"), question("b"), version="2.0"), True),
    ):
        metrics, err = metrics_of(capsys, *files(gold=gold, predictions={"a": "Rhine"}))
        assert metrics["missing_ids"] == ["b"]
        assert ("NoAns_total" in metrics, "HasAns_total" in metrics) == (False, second)
        assert metrics["exact"] == (100.0 if second else 50.0)
        assert ("left out of the totals" if second else "count as 0") in err and "b" in err


def test_missing_and_extra_ids_are_named(capsys, files):
    code, out, err = call(capsys, *files(gold=V2, predictions={"a": "The Rhine!", "x1": "", "x2": ""}))
    assert code == 0
    assert "1 question without a prediction, left out" in err and "exact 50.0000" in err
    assert "2 predictions without a question in the gold file: x1, x2" in err
    assert out.startswith("rules of SQuAD v2.0\n")
    assert [line.split() for line in out.splitlines() if line.startswith("exact")] == [["exact", "100.0000"]]


def test_null_odds_and_their_threshold(capsys, files):
    paths = files(gold=V2, predictions={"a": "Rhine", "b": "long"}, odds={"b": 3.0, "a": 2.0})
    metrics, err = metrics_of(capsys, *paths[:2], "--null_odds", paths[2])
    assert (metrics["exact"], metrics["HasAns_exact"], metrics["NoAns_exact"]) == (50.0, 0.0, 100.0)
    assert "2 answers taken for none, as the null odds exceed 1" in err
    assert (metrics["best_exact"], metrics["best_exact_thresh"]) == (100.0, 2.0)
    metrics, err = metrics_of(capsys, *paths[:2], "--null_odds", paths[2], "--null_odds_threshold", "none")
    assert (metrics["exact"], metrics["HasAns_exact"], err) == (50.0, 100.0, "")
    metrics, _ = metrics_of(capsys, *paths[:2], "--null_odds", paths[2], "--null_odds_threshold", "2.5")
    assert metrics["exact"] == 100.0
    assert "a number" in call(capsys, *paths[:2], "--null_odds_threshold", "nan")[2]


def test_intervals_hold_the_score(capsys, files):
    questions = [question(f"q{i}", "yes") for i in range(50)]
    gold = article(version="1.1")
    gold["data"][0]["paragraphs"] = [{"context": f"c{i}", "qas": [q]} for i, q in enumerate(questions)]
    predictions = {f"q{i}": "yes" if i % 5 else "no" for i in range(50)}
    metrics, _ = metrics_of(capsys, *files(gold=gold, predictions=predictions), "--confidence")
    assert metrics["exact"] == 80.0
    assert 65 < metrics["exact_low"] < 72 and 88 < metrics["exact_high"] < 95


def test_explain_lists_the_differences_and_what_they_cost(capsys, files):
    a, b, gold = files(a={"a": "the Rhine", "b": ""}, b={"a": "Rhine is", "b": "long", "z": "?"}, gold=V2)
    code, out, _ = call(capsys, "--explain", a, b, gold)
    assert code == 0
    assert "2 of 2 questions answered differently: better in B 0, worse in B 2" in out
    lines = out.splitlines()
    assert lines[-2].startswith("b  F1 1.00 -> 0.00 (-50.0000 points)")
    assert lines[-1].startswith("a  F1 1.00 -> 0.67 (-16.6667 points)  A 'the Rhine'  B 'Rhine is'")
    report = json.loads(call(capsys, "--explain", a, b, gold, "--json")[1])
    assert (report["exact_a"], report["exact_b"], report["different"]) == (100.0, 0.0, 2)
    same = json.loads(call(capsys, "--explain", a, a, gold, "--json")[1])
    assert (same["differences"], same["f1_p_value"], same["f1_difference_interval"]) == ([], 1.0, [0.0, 0.0])


def test_gold_in_the_form_that_datasets_gives(capsys, files):
    gold = article({"id": 7, "question": "?", "answers": {"text": ["Rhine"], "answer_start": [4]}}, version="1.1")
    assert metrics_of(capsys, *files(gold=gold, predictions={"7": "Rhine"}))[0]["exact"] == 100.0


@pytest.mark.parametrize(
    ("gold", "predictions", "odds", "message"),
    [
        (None, {}, None, "gold.json: cannot be read: No such file or directory"),
        ('{"data": [', {}, None, "gold.json: line 1, column 11: not JSON: Expecting value (the file ends there"),
        ("[" * 100000, {}, None, "gold.json: unreadable JSON"),
        ([], {}, None, "gold.json: not SQuAD JSON: an object with a list of articles under 'data'"),
        ({"data": [{"paragraphs": [{"qas": 3}]}]}, {}, None, "gold.json: data[0].paragraphs[0]: not SQuAD JSON"),
        (article({"question": "?"}), {}, None, "data[0].paragraphs[0].qas[0]: a question without an id"),
        (article({"id": "a", "answers": [{"text": 3}]}), {}, None, "answers of question a are not a list of texts"),
        (article({"id": "a", "answers": 3}), {}, None, "answers of question a are not a list of texts"),
        (article(), {}, None, "has no questions"),
        (V2, [], None, "predictions.json: holds a list; a JSON object of answer texts by question id is expected"),
        (V2, {"a": None}, None, "the prediction of 'a' is null, not a text"),
        (V2, {"a": [{"text": "x"}]}, None, "is this an n-best file? give predictions.json"),
        (V2, {"z": ""}, None, "none of the 2 gold questions has a prediction"),
        (V2, {"a": ""}, {}, "the null odds lack 1 questions that have a prediction (first: a)"),
        (V2, {"a": ""}, {"a": "1"}, "the null odds of 'a' are a text, not a number"),
        (V2, {"a": ""}, '{"a": NaN}', "the null odds of 'a' are nan, not a number"),
        (article(question("a", "x"), version="1.1"), {"a": ""}, {"a": 1}, "is SQuAD v1.1 data"),
    ],
)
def test_broken_files_are_one_line(capsys, files, tmp_path, gold, predictions, odds, message):
    given = {k: v for k, v in {"gold": gold, "predictions": predictions, "odds": odds}.items() if v is not None}
    files(**given)
    arguments = [str(tmp_path / "gold.json"), str(tmp_path / "predictions.json")]
    code, out, err = call(
        capsys, *arguments, *(["--null_odds", str(tmp_path / "odds.json")] if odds is not None else [])
    )
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_bytes_that_are_not_text(capsys, files, tmp_path):
    (path,) = files(predictions={})
    (tmp_path / "gold.json").write_bytes(b'{"data": "\xff"}')
    assert "gold.json: not UTF-8 text (byte 10)" in call(capsys, str(tmp_path / "gold.json"), path)[2]


def test_wrong_calls(capsys, files):
    a, b, gold = files(a={"a": ""}, b={"q": ""}, gold=V2)
    assert "takes a gold file and a predictions file" in call(capsys, gold)[2]
    assert "takes all its three files itself" in call(capsys, gold, "--explain", a, b, gold)[2]
    assert "answers no question of the gold file" in call(capsys, "--explain", a, b, gold)[2]


def process(*arguments):
    command = [sys.executable, "-m", "qa_deepspeed", "score", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)


def test_a_real_process_prints_one_line_and_brings_no_torch(files):
    gold, predictions = files(gold=V2, predictions={"a": "Rhine", "b": ""})
    done = process(gold, predictions, "--json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert (metrics["exact"], metrics["f1"], metrics["total"]) == (100.0, 100.0, 2)
    code = (
        "import sys; import qa_deepspeed.cli.results.score, qa_deepspeed.qa.decoding.exact; "
        "print([m for m in sys.modules])"
    )
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY).stdout
    heavy = {"torch", "transformers", "pandas", "pyarrow", "datasets", "deepspeed"}
    assert not heavy & set(modules.replace("'", "").strip("[]\n").split(", "))


@needs_real_data
def test_gold_answers_of_real_data_score_100(tmp_path):
    gold = json.loads((DATA / "en-v2-dev.json").read_text(encoding="utf-8"))
    questions = [q for a in gold["data"] for p in a["paragraphs"] for q in p["qas"]]
    predictions = tmp_path / "predictions.json"
    predictions.write_text(json.dumps({q["id"]: q["answers"][0]["text"] if q["answers"] else "" for q in questions}))
    done = process(DATA / "en-v2-dev.json", predictions, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["exact"] == 100.0


@pytest.mark.parametrize("version", ["1.1", "v2.0"])
def test_questions_without_gold_are_not_scored(capsys, files, version):
    unknown = {"id": "u", "question": "?"}
    gold, answers = files(
        gold=article(question("a", "Rhine"), unknown, version=version), answers={"a": "Rhine", "u": "long"}
    )
    code, out, err = call(capsys, gold, answers, "--json")
    found = json.loads(out)
    assert code == 0 and (found["exact"], found["total"], found["extra"]) == (100, 1, 0)
    assert "1 question without gold answers, not scored: u" in err
    assert found["ids_without_gold"] == ["u"]
    (none,) = files(none=article(unknown, version=version))
    code, _, err = call(capsys, none, answers)
    assert code == 2 and "none of its 1 questions has gold answers" in err


ROWS = [
    {"id": "a", "question": "?", "context": "The Rhine is long.", "answers": {"text": ["Rhine"], "answer_start": [4]}},
    {"id": "b", "question": "?", "context": "The Rhine is long.", "answers": {"text": [], "answer_start": []}},
]


def written(path, rows):
    """Rows as a file of the kind that the name says."""
    if path.suffix == ".csv":
        cells = [[row["id"], row["question"], row["context"], json.dumps(row["answers"])] for row in rows]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["id", "question", "context", "answers"], *cells])
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(json.dumps({"version": "2.0", "data": article_of(rows)}).encode()))
    elif path.name == "lines.json" or path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(
            json.dumps({"list.json": rows, "rows.json": {"data": rows}, "split.json": {"dev": rows}}[path.name])
        )
    return str(path)


def article_of(rows):
    asked = [{**row, "answers": [{"text": text, "answer_start": 4} for text in row["answers"]["text"]]} for row in rows]
    return [{"paragraphs": [{"context": rows[0]["context"], "qas": asked}]}]


@pytest.mark.parametrize(
    "name", ["d.csv", "d.jsonl", "lines.json", "list.json", "rows.json", "split.json", "squad.json.gz"]
)
def test_gold_in_every_format_that_evaluations_read(capsys, files, tmp_path, name):
    gold = written(tmp_path / name, ROWS)
    (predictions,) = files(predictions={"a": "Rhine", "b": ""})
    metrics, err = metrics_of(capsys, gold, predictions)
    assert (metrics["exact"], metrics["total"], metrics["NoAns_total"], err) == (100.0, 2, 1, "")


def test_rows_of_a_gold_file_that_cannot_be_read_are_said(capsys, files, tmp_path):
    gold = written(tmp_path / "d.jsonl", [*ROWS, {**ROWS[0], "id": "c", "context": None}])
    (predictions,) = files(predictions={"a": "Rhine", "b": ""})
    metrics, err = metrics_of(capsys, gold, predictions)
    assert metrics["total"] == 2 and "left out: " in err and "line 3: context missing" in err


@pytest.mark.parametrize("top_k", [1, 2])
def test_lines_of_predict_are_predictions(capsys, files, tmp_path, top_k):
    answers = {"a": {"score": 0.5, "start": 4, "end": 9, "answer": "Rhine"}, "b": {"score": 1, "answer": ""}}
    lines = [{"id": key, **(one if top_k == 1 else {"answers": [one, one]})} for key, one in answers.items()]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    (gold,) = files(gold=V2)
    assert metrics_of(capsys, gold, str(path))[0]["exact"] == 100.0
    path.write_text(json.dumps(lines[0]))
    assert metrics_of(capsys, gold, str(path))[0]["total"] == 1
    path.write_text(json.dumps(lines[0]) + "\n{}\n")
    assert "line 2: not a line of predict" in call(capsys, gold, str(path))[2]
