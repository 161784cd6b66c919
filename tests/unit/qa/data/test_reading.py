"""Each fixture in tests/data/broken holds a good question and one that is broken in the way its name says."""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

from qa_deepspeed.cli.data.sample import make_corpora
from qa_deepspeed.qa.data.examples import NO_GOLD, Answer, Example
from qa_deepspeed.qa.data.read_report import ReadReport, Reason
from qa_deepspeed.qa.data.reading import DataSource, read_examples
from qa_deepspeed.utils.errors import UserError
from tests.paths import DATA, REPOSITORY, needs_real_data

BROKEN = REPOSITORY / "tests" / "data" / "broken"
REPAIRABLE = REPOSITORY / "tests" / "data" / "repairable"
SECOND_QUESTION = "data[0].paragraphs[0].qas[1]"
SECOND_PARAGRAPH = "data[0].paragraphs[1]"

# fixture -> (reason, place of the broken question, whether evaluation answers it nevertheless)
VERDICTS = {
    "answer_not_at_start": (Reason.NOT_AT_START, SECOND_QUESTION, True),
    "answer_near_but_twice": (Reason.AMBIGUOUS, SECOND_QUESTION, True),
    "answer_near_but_inside_a_word": (Reason.NOT_AT_START, SECOND_QUESTION, True),
    "start_past_end": (Reason.START_PAST_END, SECOND_QUESTION, True),
    "text_absent": (Reason.TEXT_ABSENT, SECOND_QUESTION, True),
    "empty_answer": (Reason.EMPTY_ANSWER, SECOND_QUESTION, True),
    "blank_answer": (Reason.EMPTY_ANSWER, SECOND_QUESTION, True),
    "answer_text_null": (Reason.BAD_ANSWER_TEXT, SECOND_QUESTION, True),
    "answer_text_number": (Reason.BAD_ANSWER_TEXT, SECOND_QUESTION, True),
    "start_true": (Reason.BAD_START, SECOND_QUESTION, True),
    "start_fraction": (Reason.BAD_START, SECOND_QUESTION, True),
    "answers_missing": (Reason.NO_ANSWER_LIST, SECOND_QUESTION, True),
    "answers_null": (Reason.NO_ANSWER_LIST, SECOND_QUESTION, True),
    "answers_number": (Reason.BAD_ANSWER_LIST, SECOND_QUESTION, True),
    "answers_of_unequal_length": (Reason.BAD_ANSWER_LIST, SECOND_QUESTION, True),
    "no_answers_in_v1": (Reason.NO_ANSWERS, SECOND_QUESTION, True),
    "no_answers_though_possible": (Reason.NO_ANSWERS_BUT_POSSIBLE, SECOND_QUESTION, True),
    "impossible_with_answers": (Reason.IMPOSSIBLE_WITH_ANSWERS, SECOND_QUESTION, True),
    "is_impossible_unclear": (Reason.BAD_IS_IMPOSSIBLE, SECOND_QUESTION, True),
    "id_list": (Reason.BAD_ID, SECOND_QUESTION, False),
    "id_true": (Reason.BAD_ID, SECOND_QUESTION, False),
    "duplicate_id": (Reason.DUPLICATE_ID, SECOND_QUESTION, False),
    "question_missing": (Reason.NO_QUESTION, SECOND_QUESTION, False),
    "question_null": (Reason.NO_QUESTION, SECOND_QUESTION, False),
    "question_empty": (Reason.EMPTY_QUESTION, SECOND_QUESTION, False),
    "question_blank": (Reason.EMPTY_QUESTION, SECOND_QUESTION, False),
    "question_half_surrogate": (Reason.BROKEN_UNICODE, SECOND_QUESTION, False),
    "question_is_text": (Reason.NOT_SQUAD, SECOND_QUESTION, False),
    "question_is_null": (Reason.NOT_SQUAD, SECOND_QUESTION, False),
    "context_empty": (Reason.EMPTY_CONTEXT, f"{SECOND_PARAGRAPH}.qas[0]", True),
    "context_blank": (Reason.EMPTY_CONTEXT, f"{SECOND_PARAGRAPH}.qas[0]", True),
    "context_missing": (Reason.NO_CONTEXT, f"{SECOND_PARAGRAPH}.qas[0]", False),
    "context_null": (Reason.NO_CONTEXT, f"{SECOND_PARAGRAPH}.qas[0]", False),
    "context_half_surrogate": (Reason.BROKEN_UNICODE, f"{SECOND_PARAGRAPH}.qas[0]", False),
    "paragraph_null": (Reason.NOT_SQUAD, SECOND_PARAGRAPH, False),
    "questions_missing": (Reason.NOT_SQUAD, SECOND_PARAGRAPH, False),
    "article_null": (Reason.NOT_SQUAD, "data[1]", False),
    "paragraphs_null": (Reason.NOT_SQUAD, "data[1].paragraphs", False),
}
IN_VERSION_2 = {"no_answers_though_possible", "impossible_with_answers", "is_impossible_unclear"}


def read(path, purpose="train", version_2=False, **settings):
    report = ReadReport()
    files = (str(path),) if isinstance(path, (str, Path)) else tuple(map(str, path))
    return list(read_examples(DataSource(files, purpose, version_2, **settings), report)), report


def write_squad(path, paragraphs, **top):
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}], **top}), encoding="utf-8")
    return path


def question(identity, text="1867", start=0, **more):
    return {"id": identity, "question": "When?", "answers": [{"text": text, "answer_start": start}], **more}


def test_every_broken_fixture_has_a_verdict():
    assert {path.stem for path in BROKEN.glob("*.json")} == {*VERDICTS, *READABLE}


@pytest.mark.parametrize("name", VERDICTS)
def test_training_rejects_the_broken_question_alone_and_says_where(name):
    reason, place, _ = VERDICTS[name]
    examples, report = read(BROKEN / f"{name}.json", version_2=name in IN_VERSION_2)
    assert [(one.question, one.answers) for one in examples] == [
        ("Where was Marie Curie born?", (Answer("Warsaw", 24),))
    ]
    assert report.rejected_by_reason == {reason: 1}
    assert [(one.where, one.reason) for one in report.rejected] == [(f"{BROKEN / name}.json: {place}", reason)]
    assert (report.usable, report.repaired, report.unanswerable) == (1, 0, 0)


READABLE = ("negative_start", "start_null", "start_text", "answers_of_text", "id_missing", "id_null", "id_empty")
"""Fixtures whose second question lacks what can be filled in: a start, where its text stands once, or an id."""


@pytest.mark.parametrize("name", READABLE)
@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_a_start_or_an_id_that_is_missing_is_filled_in(name, purpose):
    (good, filled), report = read(BROKEN / f"{name}.json", purpose)
    assert report.rejected == [] and filled.context.startswith(filled.answers[0].text, filled.answers[0].start)
    assert (report.ids_made, filled.example_id != "broken") == ((1, True) if name.startswith("id_") else (0, False))
    assert good.example_id == "good" and len(filled.answers) == 1


@pytest.mark.parametrize("name", VERDICTS)
def test_evaluation_answers_whatever_has_an_id_a_question_and_a_context(name):
    reason, _, evaluated = VERDICTS[name]
    examples, report = read(BROKEN / f"{name}.json", "evaluate", name in IN_VERSION_2)
    assert [one.example_id for one in examples] == (["good", "broken"] if evaluated else ["good"])
    assert report.rejected_by_reason == ({} if evaluated else {reason: 1})
    if not evaluated:
        return
    content = json.loads((BROKEN / f"{name}.json").read_text())
    asked = [one for part in content["data"][0]["paragraphs"] for one in part["qas"]][1]
    layout_known = isinstance(asked.get("answers"), list) and all(isinstance(one, dict) for one in asked["answers"])
    given = [one["text"] for one in asked["answers"] if isinstance(one["text"], str)] if layout_known else []
    if not given:
        assert examples[1].answers == NO_GOLD and not examples[1].has_gold
        return
    assert [answer.text for answer in examples[1].answers] == given
    for answer in examples[1].answers:
        assert answer.start == -1 or examples[1].context[answer.start :].startswith(answer.text)


def test_context_of_blanks_is_evaluated_as_empty():
    examples, _ = read(BROKEN / "context_blank.json", "evaluate")
    assert examples[1] == Example("broken", "When was Marie Curie born?", "", (Answer("1867", -1),))


@pytest.mark.parametrize("path", sorted(REPAIRABLE.glob("*.json")), ids=lambda path: path.stem)
def test_an_answer_slightly_off_is_repaired_for_training_and_scored_as_given(path):
    (example,), report = read(path)
    (answer,) = example.answers
    given = json.loads(path.read_text())["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]
    assert answer.text == given["text"].strip()
    assert answer.start == example.context.index(answer.text)
    assert (report.usable, report.repaired, report.rejected) == (1, 1, [])
    (scored,), report = read(path, "evaluate")
    assert [one.text for one in scored.answers] == [given["text"]]
    assert report.repaired == 1


def test_one_good_annotator_is_enough(tmp_path):
    answers = [
        {"text": "absent", "answer_start": 0},
        {"text": "1867", "answer_start": 0},
        {"text": "in Warsaw", "answer_start": 6},
    ]
    asked = {"id": 7, "question": "When?", "answers": answers}
    path = write_squad(tmp_path / "d.json", [{"context": "1867 in Warsaw", "qas": [asked]}])
    (example,), report = read(path)
    assert example == Example("7", "When?", "1867 in Warsaw", (Answer("1867", 0), Answer("in Warsaw", 5)))
    assert (report.usable, report.repaired, report.rejected) == (1, 1, [])
    assert report.answer_faults == {Reason.TEXT_ABSENT: 1}
    (scored,), _ = read(path, "evaluate")
    assert [answer.text for answer in scored.answers] == ["absent", "1867", "in Warsaw"]


def test_unanswerable_questions(tmp_path):
    asked = [
        {"id": "a", "question": "?", "is_impossible": True, "answers": []},
        {"id": "b", "question": "?", "is_impossible": True, "plausible_answers": [{"text": "x", "answer_start": 1}]},
        {"id": "c", "question": "?", "answers": []},
        {"id": "d", "question": "?", "is_impossible": True, "answers": [{"text": "", "answer_start": -1}]},
        {"id": "e", "question": "?", "is_impossible": False, "answers": [{"text": "text", "answer_start": 0}]},
    ]
    path = write_squad(tmp_path / "d.json", [{"context": "text", "qas": asked}])
    examples, report = read(path, version_2=True)
    assert [bool(one.answers) for one in examples] == [False] * 4 + [True]
    assert (report.usable, report.unanswerable, report.rejected) == (5, 4, [])


UNANSWERABLE: tuple[Answer, ...] = ()


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, NO_GOLD),
        ({"answers": None}, NO_GOLD),
        ({"gold": [{"text": "text", "answer_start": 0}]}, NO_GOLD),
        ({"answers": ""}, NO_GOLD),
        ({"answers": " null"}, NO_GOLD),
        ({"answers": 7}, NO_GOLD),
        ({"answers": [{"text": None, "answer_start": None}]}, NO_GOLD),
        ({"answers": {"text": None, "answer_start": None}}, NO_GOLD),
        ({"is_impossible": False}, NO_GOLD),
        ({"is_impossible": False, "answers": []}, NO_GOLD),
        ({"answers": []}, UNANSWERABLE),
        ({"answers": "[]"}, UNANSWERABLE),
        ({"answers": {"text": [], "answer_start": []}}, UNANSWERABLE),
        ({"is_impossible": True}, UNANSWERABLE),
        ({"is_impossible": "1", "answers": None}, UNANSWERABLE),
        ({"is_impossible": True, "answers": []}, UNANSWERABLE),
        ({"answers": [{"text": "", "answer_start": -1}]}, (Answer("", -1),)),
    ],
)
def test_only_an_empty_list_or_is_impossible_makes_a_question_unanswerable(tmp_path, fields, found):
    """What says nothing of its answers has no gold answers, and is no unanswerable question."""
    row = {"id": "a", "question": "?", **fields}
    path = write_squad(tmp_path / "d.json", [{"context": "text", "qas": [row]}])
    (example,), report = read(path, "evaluate", version_2=True)
    assert example.answers == found and example.has_gold == (found != NO_GOLD)
    assert report.unanswerable == (found == UNANSWERABLE)


@pytest.mark.parametrize("fields", [{}, {"answers": []}, {"answers": [{"text": 7, "answer_start": 0}]}])
def test_in_version_1_a_question_without_answers_has_no_gold(tmp_path, fields):
    path = write_squad(tmp_path / "d.json", [{"context": "text", "qas": [{"id": "a", "question": "?", **fields}]}])
    (example,), report = read(path, "evaluate")
    assert example.answers == NO_GOLD and report.unanswerable == 0


@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_a_file_named_version_2_without_unanswerable_questions_is_read_as_version_1(tmp_path, purpose):
    possible = {**question("a"), "is_impossible": False}
    path = write_squad(tmp_path / "d.json", [{"context": "1867", "qas": [possible, question("b")]}], version="v2.0")
    examples, report = read(path, purpose)
    assert [one.example_id for one in examples] == ["a", "b"] and report.rejected == []


@pytest.mark.parametrize("purpose", ["train", "evaluate"])
@pytest.mark.parametrize("version", ["v2.0", "2.0", "2", 2.0])
def test_version_2_by_its_name_needs_the_flag(tmp_path, purpose, version):
    unanswerable = {**question("b"), "answers": []}
    qas = [question("a"), unanswerable]
    path = write_squad(tmp_path / "d.json", [{"context": "1867", "qas": qas}], version=version)
    with pytest.raises(UserError, match="pass --version_2_with_negative"):
        read(path, purpose)
    assert len(read(path, purpose, version_2=True)[0]) == 2


@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_version_2_by_is_impossible_needs_the_flag(tmp_path, purpose):
    asked = [question("a", is_impossible=False), {**question("b"), "answers": [], "is_impossible": True}]
    path = write_squad(tmp_path / "d.json", [{"context": "1867", "qas": asked}])
    with pytest.raises(UserError, match=r"qas\[1\].*pass --version_2_with_negative"):
        read(path, purpose)


@pytest.mark.parametrize("version", ["1.1", "v1.1", "JaQuAD-version-0.1.0", None, 1.1, "12"])
def test_any_other_version_is_version_1_and_may_have_the_flag(tmp_path, version):
    asked = [question("a", is_impossible=False)]
    path = write_squad(tmp_path / "d.json", [{"context": "1867", "qas": asked}], version=version)
    assert read(path)[0] == read(path, version_2=True)[0] != []


def test_nothing_usable_is_an_error_that_counts_the_reasons(tmp_path):
    asked = [question("a", "x"), question("b", "y"), question("c", question=" ")]
    path = write_squad(tmp_path / "d.json", [{"context": "1867", "qas": asked}])
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path}: no usable question: rejected 2 answer text not in the context, 1 empty question; the first: "
        "data[0].paragraphs[0].qas[0]: answer text not in the context ('x': nothing like it is there); copy the answer "
        "from the context, or remove it"
    )
    with pytest.raises(UserError, match="no usable question: it holds no questions"):
        read(write_squad(path, []))


def test_each_of_several_files_must_hold_something(tmp_path):
    good = write_squad(tmp_path / "a.json", [{"context": "1867", "qas": [question("a"), question("b", "x")]}])
    bad = write_squad(tmp_path / "b.json", [{"context": "1867", "qas": [question("c", "x")]}])
    with pytest.raises(
        UserError, match="b.json: no usable question: rejected 1 answer text not in the context; the first: data"
    ):
        read([good, bad])


def test_a_duplicate_in_another_file_is_found_and_a_rejected_question_does_not_claim_its_id(tmp_path):
    first = write_squad(tmp_path / "a.json", [{"context": "1867", "qas": [question("a"), question("b", "absent")]}])
    second = write_squad(tmp_path / "b.json", [{"context": "1867", "qas": [question("a"), question("b")]}])
    examples, report = read([first, second])
    assert [one.example_id for one in examples] == ["a", "b"]
    assert report.rejected_by_reason == {Reason.DUPLICATE_ID: 1, Reason.TEXT_ABSENT: 1}


def test_questions_of_one_paragraph_share_the_context(tmp_path):
    paragraph = {"context": "1867", "qas": [question("a"), question("b")]}
    examples, _ = read(write_squad(tmp_path / "d.json", [paragraph]))
    assert examples[0].context is examples[1].context


@pytest.mark.parametrize("limit", [1, 5, 40, 100])
def test_a_limit_takes_the_questions_that_a_shuffled_list_of_all_would_give(tmp_path, limit):
    paragraphs = [{"context": "1867", "qas": [question(4 * p + k) for k in range(4)]} for p in range(10)]
    path = write_squad(tmp_path / "d.json", paragraphs)
    everything, full = read(path)
    shuffled = list(everything)
    random.Random(7).shuffle(shuffled)
    examples, report = read(path, max_examples=limit, seed=7)
    assert sorted(one.example_id for one in examples) == sorted(one.example_id for one in shuffled[:limit])
    assert examples == [one for one in everything if one in examples]
    assert report == full


def test_a_limit_counts_usable_questions_only(tmp_path):
    asked = [question(k, "absent" if k % 3 == 0 else "1867") for k in range(30)]
    path = write_squad(tmp_path / "d.json", [{"context": "1867", "qas": asked}])
    examples, report = read(path, max_examples=20)
    assert len(examples) == report.usable == 20
    assert len(report.rejected) == 10


def test_a_limit_takes_the_first_questions_for_evaluation(tmp_path):
    asked = [question(k) for k in range(9)] + [{"id": None}]
    path = write_squad(tmp_path / "d.json", [{"context": "1867", "qas": asked}])
    assert [one.example_id for one in read(path, "evaluate", max_examples=4)[0]] == list("0123")
    with pytest.raises(UserError, match="at least 1"):
        read(path, max_examples=0)


def test_the_report_survives_json_and_lists_the_rejected(tmp_path):
    asked = [question("a"), question("b", " 1867"), question("c", "x"), question("d", "é"), question([])]
    asked.append(question(None))
    path = write_squad(tmp_path / "d.json", [{"context": "1867", "qas": asked}])
    _, report = read(path)
    assert ReadReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert report.summary() == (
        "3 usable (1 repaired), 3 rejected (2 answer text not in the context, 1 id neither text nor a whole number); "
        "1 without an id got one"
    )
    report.write_rejected(tmp_path / "rejected.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == ["c", "d", "[]"]
    assert rows[2] == {"id": "[]", "where": f"{path}: data[0].paragraphs[0].qas[4]", "reason": Reason.BAD_ID}


def test_numeric_ids_are_distinguished(tmp_path):
    from qa_deepspeed.qa.data.seen_ids import SeenIds

    seen = SeenIds()
    ids = [str(number) for number in range(20000)]
    assert all(seen.add(one) for one in ids)
    assert not any(seen.add(one) for one in ids)
    assert seen.add("another")


def test_reading_needs_neither_torch_nor_transformers():
    import subprocess

    code = (
        "import sys, qa_deepspeed.qa.data.reading; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pyarrow', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


@needs_real_data
@pytest.mark.real
@pytest.mark.parametrize("purpose", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("name", "version_2", "questions", "unanswerable", "answers"),
    [
        ("en-v1-train", False, 39839, 0, 106543),
        ("en-v1-dev", False, 807, 0, 2498),
        ("en-v2-train", True, 12404, 4106, 17613),
        ("en-v2-dev", True, 1641, 849, 2452),
        ("ja-v1-sample", False, 1029, 0, 1029),
    ],
)
def test_real_files_are_read_whole(name, version_2, questions, unanswerable, answers, purpose):
    examples, report = read(DATA / f"{name}.json", purpose, version_2)
    assert (report.usable, report.unanswerable, report.repaired) == (questions, unanswerable, 0)
    assert (report.rejected, report.answer_faults) == ([], {})
    assert sum(len(one.answers) for one in examples) == answers
    document = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    expected = [
        Example(
            asked["id"],
            asked["question"],
            paragraph["context"],
            tuple(Answer(one["text"], one["answer_start"]) for one in asked["answers"]),
        )
        for article in document["data"]
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]
    assert examples == expected


@needs_real_data
@pytest.mark.real
def test_real_unanswerable_questions_need_the_flag():
    with pytest.raises(UserError, match="en-v2-dev.json: SQuAD v2.0 .*--version_2_with_negative"):
        read(DATA / "en-v2-dev.json", "evaluate")


@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_a_made_corpus_is_read_whole(tmp_path, purpose):
    """Every question in the file's order, and one object for the context of all questions of a paragraph."""
    document = make_corpora(5, 1, 6)[1]
    (tmp_path / "dev.json").write_text(json.dumps(document))
    examples, report = read(tmp_path / "dev.json", purpose, True)
    paragraphs = [paragraph for article in document["data"] for paragraph in article["paragraphs"]]
    expected = [
        (
            asked["id"],
            asked["question"],
            paragraph["context"],
            [(a["text"], a["answer_start"]) for a in asked["answers"]],
        )
        for paragraph in paragraphs
        for asked in paragraph["qas"]
    ]
    found = [(e.example_id, e.question, e.context, [(a.text, a.start) for a in e.answers]) for e in examples]
    assert found == expected
    assert report.usable == len(expected) > report.unanswerable == sum(not golds for *_, golds in expected) > 0
    per_object = Counter(id(one.context) for one in examples)
    assert sorted(per_object.values()) == sorted(len(paragraph["qas"]) for paragraph in paragraphs if paragraph["qas"])


@needs_real_data
@pytest.mark.real
def test_real_contexts_are_one_object_each():
    examples, _ = read(DATA / "en-v1-dev.json")
    per_object = Counter(id(one.context) for one in examples)
    assert len(per_object) == 145


def test_a_part_of_the_contexts_is_held_out_for_evaluation(tmp_path):
    """By the text of the context and the seed: no context on both sides, whatever its place or file."""
    paragraphs = [
        {"context": f"In 18{number:02} {number}.", "qas": [question(f"{number}-{q}", text="In", start=0) for q in "ab"]}
        for number in range(80)
    ]
    path = write_squad(tmp_path / "d.json", paragraphs)
    whole, _ = read(path)
    sides = {}
    for seed in (1, 2):
        train, _ = read(path, validation=(0.25, seed))
        held_out, _ = read(path, "evaluate", validation=(0.25, seed))
        assert sorted([*train, *held_out], key=lambda one: one.example_id) == sorted(
            whole, key=lambda one: one.example_id
        )
        assert not {one.context for one in train} & {one.context for one in held_out}
        assert 20 <= len(held_out) <= 64
        sides[seed] = {one.context for one in held_out}
    assert sides[1] != sides[2]
    again = write_squad(tmp_path / "e.json", paragraphs[::-1])
    assert {one.context for one in read(again, "evaluate", validation=(0.25, 1))[0]} == sides[1]
    with pytest.raises(UserError, match="none of its contexts is drawn for evaluate at validation_split 1e-09"):
        read(path, "evaluate", validation=(1e-9, 1))
