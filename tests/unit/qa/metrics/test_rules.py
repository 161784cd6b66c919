"""Rules of the official scripts on answers written here, and totals over many chunks of questions."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from qa_deepspeed.qa.metrics import records, thresholds
from qa_deepspeed.qa.metrics.normalization import normalized_tokens
from qa_deepspeed.qa.metrics.squad import Gold, Scorer, f1_of_tokens, score, score_answer


@pytest.mark.parametrize(
    ("gold", "answer", "common", "f1"),
    [
        ("New York New York", "New York", 2, 2 / 3),
        ("New York", "New York New York", 2, 2 / 3),
        ("ding ding ding dong", "ding ding", 2, 2 / 3),
        ("one two", "two one", 2, 1.0),
        ("one one two", "one two two", 2, 2 / 3),
    ],
)
def test_a_repeated_word_counts_as_often_as_both_have_it(gold: str, answer: str, common: int, f1: float) -> None:
    """Precision and recall over multisets, as `collections.Counter` has it in the official script."""
    words, given = gold.split(), answer.split()
    assert f1_of_tokens(words, given) == pytest.approx(2 * common / (len(words) + len(given))) == pytest.approx(f1)
    exact, found = score_answer(answer, (gold,), v2=False)
    assert (exact, found) == (0, pytest.approx(f1))


def test_the_best_of_several_gold_texts_counts() -> None:
    assert score_answer("green tea", ("tea", "cold green tea", "coffee"), v2=True) == (0, pytest.approx(0.8))


def test_of_a_repeated_id_version_2_counts_the_last_entry() -> None:
    golds = [Gold("a", ("x",)), Gold("b", ()), Gold("a", ("y",))]
    assert score(golds, {"a": "y", "b": ""}, version_2_with_negative=True)["exact"] == 100.0
    assert score(golds, {"a": "x", "b": ""}, version_2_with_negative=True)["exact"] == 50.0


def questions(count: int) -> Iterator[tuple[Gold, str, float, str]]:
    """(gold, given answer, null odds, best span) of generated questions; many odds are equal."""
    random = np.random.default_rng(3)
    words = ["red", "green", "blue", "red red", "green red", ""]
    for number in range(count):
        gold = () if random.random() < 0.4 else (words[random.integers(0, 5)],)
        best = words[random.integers(0, 5)]
        odds = float(random.integers(-3, 4)) / 2
        yield Gold(f"q{number}", gold), "" if odds > 0.5 else best, odds, best


def scored(count: int) -> Scorer:
    """A scorer that has these questions."""
    scorer = Scorer(version_2_with_negative=True)
    for gold, text, odds, best in questions(count):
        scorer.add(gold, text, odds, best)
    return scorer


@pytest.mark.parametrize("count", [1, 20, 21, 100])
@pytest.mark.parametrize("threshold", [None, -1.0, 0.5])
def test_totals_are_carried_over_chunks(count: int, threshold: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scored(count).result(threshold)
    monkeypatch.setattr(records, "RECORDS_IN_MEMORY", 6)
    monkeypatch.setattr(records, "RECORDS_AT_ONCE", 7)
    monkeypatch.setattr(thresholds, "QUESTIONS_AT_ONCE", 5)
    found = scored(count).result(threshold)
    assert found == pytest.approx(expected, abs=1e-9)
    assert found["total"] == count
    both = [score_answer(text, gold.texts, True) for gold, text, _, _ in questions(count)]
    if threshold is None:
        assert found["exact"] == pytest.approx(100 * np.mean([exact for exact, _ in both]))
        assert found["f1"] == pytest.approx(100 * np.mean([f1 for _, f1 in both]))


def test_records_are_whole_after_each_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RECORDS_IN_MEMORY", 4)
    kept = records.QuestionRecords(np.dtype([("number", "i8")]))
    for number in range(23):
        kept.append((number,))
        assert kept.columns()["number"].tolist() == list(range(number + 1))


def test_questions_fall_into_two_halves_by_their_id() -> None:
    half = scored(400).records()["half"]
    assert half.tolist() == [bool(zlib.crc32(f"q{number}".encode()) % 2) for number in range(400)]
    assert 150 < half.sum() < 250


def test_an_article_between_symbols_parts_its_neighbours() -> None:
    """The official scripts put a blank in its place; \\b also holds beside a symbol that is no punctuation of ASCII."""
    assert normalized_tokens("5€a€b", "en") == ["5€", "€b"]
