"""The analysis: calibration, precision-recall curves, slices and mistakes."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.decoding.predictions import Prediction, columns_of
from qa_deepspeed.qa.metrics import records as records_module
from qa_deepspeed.qa.metrics import thresholds
from qa_deepspeed.qa.metrics.squad import Gold, Scorer, score
from qa_deepspeed.qa.metrics.thresholds import by_odds
from qa_deepspeed.qa.report import analysis
from qa_deepspeed.qa.report.analysis import MAX_MISTAKES, Analysis, calibration, precision_recall, question_word


def test_calibration_error_is_the_weighted_gap_of_the_bins():
    found = calibration(np.array([0.0, 0.1, 0.15, 0.95, 1.0, 1.0]), np.array([0, 0, 1, 1, 1, 0]))
    assert [(b["from"], b["questions"]) for b in found["bins"]] == [(0.0, 2), (0.1, 1), (0.9, 3)]
    gaps = [2 * 0.05, 1 * 0.85, 3 * abs(2.95 / 3 - 2 / 3)]
    assert found["expected_calibration_error"] == pytest.approx(sum(gaps) / 6)
    sure_and_right = calibration(np.ones(5), np.ones(5))
    assert sure_and_right["expected_calibration_error"] == 0


def official_average_precision(scores, has_answer, odds):
    order = sorted(range(len(odds)), key=lambda i: odds[i])
    earned, average, before = 0.0, 0.0, 0.0
    for i, k in enumerate(order):
        earned += scores[k] if has_answer[k] else 0
        if i == len(order) - 1 or odds[k] != odds[order[i + 1]]:
            average += earned / (i + 1) * (earned / sum(has_answer) - before)
            before = earned / sum(has_answer)
    return 100 * average


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.booleans(), st.sampled_from([-1.0, 0.0, 2.0]) | st.floats(-9, 9)), min_size=1
    )
)
def test_average_precision_equals_official_script(rows):
    scores, has_answer, odds = (np.array(column) for column in zip(*rows, strict=True))
    found = precision_recall(scores, has_answer, odds, by_odds(odds))
    expected = official_average_precision(scores, has_answer, odds) if has_answer.any() else 0.0
    assert found["average_precision"] == pytest.approx(expected, abs=1e-9)
    assert len(found["threshold"]) == len(found["precision"]) == len(found["recall"])


def example(number, question, context, *answers):
    return Example(f"q{number}", question, context, tuple(Answer(text, context.find(text)) for text in answers))


def prediction(number, text, probability, odds=None, start=0):
    nbest = [(text, probability, 1.0, 1.0, start)]
    return Prediction(f"q{number}", text, columns_of(nbest), odds)


def reported(v2, rows):
    """The report on rows of (example, prediction, windows)."""
    scorer, analysis = Scorer(v2), Analysis(v2)
    for example, prediction, windows in rows:
        gold = Gold(example.example_id, tuple(answer.text for answer in example.answers))
        analysis.add(
            example,
            prediction,
            windows,
            *scorer.add(gold, prediction.text, prediction.null_odds, prediction.best_span_text),
        )
    return analysis.report(scorer.records())


def test_slices_average_to_the_scores():
    rows = [
        (example(0, "Who ran?", "Ann ran far.", "Ann"), prediction(0, "Ann", 0.9, -1.0), 1),
        (example(1, "In what year, and who?", "It was 1999. " * 30, "1999"), prediction(1, "was 1999", 0.5, 0.0), 2),
        (example(2, "Name it", "x " * 200), prediction(2, "x", 0.7, -2.0), 4),
        (example(3, "How many?", "two", "two"), prediction(3, "", 0.8, 5.0, -1), 0),
    ]
    report = json.loads(json.dumps(reported(True, rows)))
    golds = [Gold(e.example_id, tuple(a.text for a in e.answers)) for e, _, _ in rows]
    metrics = score(golds, {p.example_id: p.text for _, p, _ in rows}, version_2_with_negative=True)
    for name, values in report["slices"].items():
        total = sum(v["questions"] for v in values.values())
        assert total == (3 if name == "answer_words" else 4), name
        if total == 4:
            for metric in ("exact", "f1"):
                assert sum(v["questions"] * v[metric] for v in values.values()) / 4 == pytest.approx(metrics[metric])
    assert {k: v["questions"] for k, v in report["slices"]["question_word"].items()} == {
        "how many": 1,
        "other": 1,
        "what": 1,
        "who": 1,
    }
    assert list(report["slices"]["windows"]) == ["0", "1", "2", "4+"]
    assert list(report["slices"]["context_words"]) == ["0-50", "51-100", "151-200"]
    assert report["slices"]["answerable"]["no"] == {"questions": 1, "exact": 0.0, "f1": 0.0}
    assert [m["example_id"] for m in report["mistakes"]] == ["q3", "q2", "q1"]
    for name, (low, high) in report["intervals"].items():
        assert 0 <= low <= metrics[name] <= high <= 100
    assert (
        report["precision_recall"]["oracle"]["average_precision"]
        > report["precision_recall"]["exact"]["average_precision"]
    )


def cases_of_paragraphs(paragraphs, seed):
    """Rows of up to six questions a paragraph, whose scores depend on the paragraph and on the question's kind."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(paragraphs):
        context, easy = f"Ann and Bob met in town {number}.", generator.random()
        for _ in range(generator.integers(1, 7)):
            word = generator.choice(["who", "where", "why"], p=[0.5, 0.4, 0.1])
            gold = "Ann and Bob" if generator.random() < 0.7 else ""
            right = generator.random() < 0.6 * easy + (0.4 if word == "who" else 0.0)
            text = gold if right else ("Ann" if generator.random() < 0.5 else "town")
            row = len(rows)
            golds = [gold] if gold else []
            rows.append((example(row, f"{word}?", context, *golds), prediction(row, text, 0.5, 0.0), 1))
    return rows


def brute_force_interval(scores, paragraph, resamples=3000):
    """Percentiles of the mean over paragraphs drawn one by one; draws without a question do not count."""
    generator = np.random.default_rng(99)
    everyone = np.unique(paragraph)
    of_paragraph = {
        one: [s for s, p in zip(scores, paragraph, strict=True) if p == one and s is not None] for one in everyone
    }
    means = []
    for _ in range(resamples):
        drawn = [score for one in generator.choice(everyone, len(everyone)) for score in of_paragraph[one]]
        if drawn:
            means.append(sum(drawn) / len(drawn))
    return np.percentile(means, [2.5, 97.5])


@pytest.mark.parametrize("paragraphs", [12, 60])
def test_intervals_of_slices_equal_a_brute_force_bootstrap(paragraphs):
    rows = cases_of_paragraphs(paragraphs, paragraphs)
    report = reported(True, rows)
    golds = [Gold(e.example_id, tuple(a.text for a in e.answers)) for e, *_ in rows]
    scores = [Scorer(True).add(g, p.text, 0.0, p.text) for g, (_, p, _) in zip(golds, rows, strict=True)]
    paragraph = [e.context for e, *_ in rows]
    compared = 0
    for name, value_of in (
        ("question_word", lambda e: e.question[:-1]),
        ("answerable", lambda e: "yes" if e.answers else "no"),
    ):
        for value, cell in report["slices"][name].items():
            inside = [value_of(e) == value for e, *_ in rows]
            if len({one for one, this in zip(paragraph, inside, strict=True) if this}) < analysis.MIN_PARAGRAPHS:
                assert "intervals" not in cell
                continue
            for place, metric in enumerate(("exact", "f1")):
                of_slice = [100 * s[place] if this else None for s, this in zip(scores, inside, strict=True)]
                low, high = brute_force_interval(of_slice, paragraph)
                close = pytest.approx((low, high), abs=0.08 * (high - low))
                assert cell["intervals"][metric] == close, (name, value, metric)
                assert low < cell[metric] < high
                compared += 1
    assert compared >= 6


def test_interval_of_all_is_that_of_a_slice_that_holds_all():
    report = reported(False, cases_of_paragraphs(30, 1))
    assert report["slices"]["windows"]["1"]["intervals"] == report["intervals"]


def test_most_confident_mistakes_are_listed_with_context():
    context = "left " * 100 + "wrong" + " right" * 100
    rows = [
        (example(i, "what?", context, "left"), prediction(i, "wrong", (i * 7 % 100) / 100, start=500), 1)
        for i in range(3 * MAX_MISTAKES)
    ]
    mistakes = reported(False, rows)["mistakes"]
    every = sorted(((i * 7 % 100) / 100 for i in range(3 * MAX_MISTAKES)), reverse=True)
    assert [m["probability"] for m in mistakes] == every[:MAX_MISTAKES]
    assert mistakes[0]["context"] == "…" + "left " * 16 + "wrong" + " right" * 13 + " r" + "…"
    assert mistakes[0]["gold"] == ["left"]


@pytest.mark.parametrize(
    ("question", "word"),
    [("How many men?", "how many"), ("However, why?", "why"), ("In which city", "which"), ("Name one.", "other")],
)
def test_question_words(question, word):
    assert question_word(question) == word


def test_spilled_records_in_chunks_give_the_same_report(monkeypatch):
    """The same rows, with records spilled to a file and processed in small chunks; ties cross chunk borders."""
    rows = [
        (
            example(i, f"what {i}?", f"context {i // 4} yes no", *(["yes"] if i % 3 else [])),
            prediction(i, ["yes", "no"][i % 2], i % 11 / 11, i % 7 - 3.0),
            i % 4,
        )
        for i in range(300)
    ]
    scores = {q.example_id: q for q in (row[1] for row in rows)}
    golds = [Gold(e.example_id, tuple(a.text for a in e.answers)) for e, *_ in rows]

    def everything():
        answers, odds = {k: p.text for k, p in scores.items()}, {k: p.null_odds for k, p in scores.items()}
        return reported(True, rows), score(golds, answers, odds), score(golds, answers, odds, threshold=0.5)

    at_once = everything()
    for module, name in (
        (records_module, "RECORDS_IN_MEMORY"),
        (records_module, "RECORDS_AT_ONCE"),
        (thresholds, "QUESTIONS_AT_ONCE"),
        (analysis, "QUESTIONS_AT_ONCE"),
    ):
        monkeypatch.setattr(module, name, 16)
    in_parts = everything()
    assert in_parts[0]["mistakes"] == at_once[0]["mistakes"]
    without = [
        {k: {v: {**c, "intervals": None} for v, c in cells.items()} for k, cells in found[0]["slices"].items()}
        for found in (in_parts, at_once)
    ]
    assert without[0] == without[1]
    ends = [
        [c["intervals"][m] for cells in found[0]["slices"].values() for c in cells.values() for m in ("exact", "f1")]
        for found in (in_parts, at_once)
    ]
    np.testing.assert_allclose(*ends, rtol=1e-12)
    for part, whole in zip(in_parts[1:], at_once[1:], strict=True):
        assert part == pytest.approx(whole)
    for name in ("exact", "f1", "oracle"):
        part, whole = (found[0]["precision_recall"][name] for found in (in_parts, at_once))
        for column in whole:
            assert part[column] == pytest.approx(whole[column])
    assert in_parts[0]["calibration"]["expected_calibration_error"] == pytest.approx(
        at_once[0]["calibration"]["expected_calibration_error"]
    )
