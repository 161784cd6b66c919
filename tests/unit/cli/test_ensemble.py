"""Answers of several runs together."""

import json
import math
from argparse import Namespace

import pytest

from qa_deepspeed.cli.main import Parser
from qa_deepspeed.cli.results import ensemble
from qa_deepspeed.qa.decoding.predictions import NBEST_FIELDS, DecodeSettings
from qa_deepspeed.utils.errors import UserError


def entry(text, probability, logit=1.0, start=0):
    return text, probability, logit, logit, start


RUNS = [
    {"a": [entry("x", 0.6, 3.0, 7), entry("y", 0.3), entry("", 0.1)], "b": [entry("", 0.9), entry("z", 0.1)]},
    {"a": [entry("y", 0.5), entry("y", 0.2), entry("", 0.3)], "b": [entry("", 0.7), entry("z", 0.3)]},
]
V2 = DecodeSettings(version_2_with_negative=True)


def test_probabilities_are_averaged_by_text():
    a, b = ensemble.combine(RUNS, V2)
    assert [(text, round(share, 6)) for text, share, *_ in a.nbest] == [("y", 0.5), ("x", 0.3), ("", 0.2)]
    assert [e for e in a.nbest if e[0] == "x"] == [entry("x", 0.3, 3.0, 7)]
    assert (a.text, b.text) == ("y", "")
    assert a.null_odds == pytest.approx(math.log(0.2 / 0.5))
    assert b.null_odds == pytest.approx(math.log(0.8 / 0.2))
    answers = ensemble.combine(RUNS, DecodeSettings(version_2_with_negative=True, null_score_diff_threshold=2.0))
    assert [p.text for p in answers] == ["y", "z"]
    assert [p.text for p in ensemble.combine(RUNS, DecodeSettings(n_best_size=1))] == ["y", "z"]
    assert [len(p.nbest) for p in ensemble.combine(RUNS, DecodeSettings(n_best_size=1))] == [1, 1]


def test_runs_that_agree_change_nothing():
    (one,) = ensemble.combine([{"a": RUNS[0]["a"]}] * 3, V2)
    assert [text for text, *_ in one.nbest] == ["x", "y", ""]
    assert [share for _, share, *_ in one.nbest] == pytest.approx([0.6, 0.3, 0.1])


def test_a_question_without_any_span():
    (one,) = ensemble.combine([{"a": [entry("", 1.0)]}] * 2, V2)
    assert (one.text, one.null_odds, len(one.nbest)) == ("", 1e6, 1)


def as_file(run):
    return json.dumps({key: [dict(zip(NBEST_FIELDS, one, strict=True)) for one in run[key]] for key in run})


def call(*arguments):
    parser = Parser()
    ensemble.add_arguments(parser)
    return ensemble.run(parser.parse_all(list(map(str, arguments))))


def test_files_in_and_out(tmp_path, capsys):
    for i, run in enumerate(RUNS):
        (tmp_path / f"{i}.json").write_text(as_file(run))
    assert (
        call(tmp_path / "0.json", tmp_path / "1.json", "--output_dir", tmp_path / "o", "--version_2_with_negative") == 0
    )
    assert "2 questions of 2 runs" in capsys.readouterr().out
    assert json.loads((tmp_path / "o" / "predictions.json").read_text()) == {"a": "y", "b": ""}
    assert json.loads((tmp_path / "o" / "null_odds.json").read_text()).keys() == {"a", "b"}
    with pytest.raises(UserError, match="two runs or more"):
        call(tmp_path / "0.json", "--output_dir", tmp_path)
    with pytest.raises(UserError, match="--n_best_size is 0"):
        call(tmp_path / "0.json", tmp_path / "1.json", "--output_dir", tmp_path, "--n_best_size", 0)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (json.loads(as_file({"a": RUNS[0]["a"]})), "its questions are not those of .* such as b"),
        ({"a": "x", "b": "y"}, "'a' has a text where an n-best list is expected"),
        ({"a": [], "b": []}, "'a' has a list where an n-best list is expected"),
        ({"a": [{"text": "x"}]}, "an entry of 'a' lacks text, probability"),
        ([1], "holds a list; a JSON object of n-best lists"),
    ],
)
def test_wrong_files(tmp_path, second, message):
    (tmp_path / "0.json").write_text(as_file(RUNS[0]))
    (tmp_path / "1.json").write_text(json.dumps(second))
    with pytest.raises(UserError, match=message):
        call(tmp_path / "0.json", tmp_path / "1.json", "--output_dir", tmp_path / "o")


@pytest.mark.parametrize("through_a_link", [False, True])
def test_the_runs_own_files_are_not_overwritten(tmp_path, through_a_link):
    for name, run in zip("ab", RUNS, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "nbest_predictions.json").write_text(as_file(run))
    out = tmp_path / "a"
    if through_a_link:
        out = tmp_path / "link"
        out.symlink_to(tmp_path / "a")
    paths = [str(tmp_path / name / "nbest_predictions.json") for name in "ab"]
    with pytest.raises(UserError, match="is the file that is read"):
        ensemble.run(Namespace(nbest=paths, output_dir=str(out), n_best_size=20))
    assert (tmp_path / "a/nbest_predictions.json").read_text() == as_file(RUNS[0])
    assert not (tmp_path / "a/predictions.json").exists()


def test_folders_of_runs_are_taken_and_scored(tmp_path, capsys):
    for i, run in enumerate(RUNS):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "nbest_predictions.json").write_text(as_file(run))
    gold = tmp_path / "gold.json"
    asked = [{"id": "a", "answers": [{"text": "y"}]}, {"id": "b", "answers": []}, {"id": "c", "answers": []}]
    gold.write_text(json.dumps({"version": "v2.0", "data": [{"paragraphs": [{"context": "x y z", "qas": asked}]}]}))
    folders = (tmp_path / "0", tmp_path / "1", "--output_dir", tmp_path / "o", "--version_2_with_negative")
    assert call(*folders, "--gold", gold) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["exact", "100.0000"] in lines and ["missing", "1"] in lines
    (tmp_path / "2").mkdir()
    with pytest.raises(UserError, match="2: holds no nbest_predictions.json: evaluate the run first"):
        call(tmp_path / "2", *folders)
