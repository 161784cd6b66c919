"""The result of one scoring pass: the numbers of each question, samples and report."""

from __future__ import annotations

import numpy as np
import pytest

from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.decoding.predictions import Prediction, columns_of
from qa_deepspeed.qa.metrics import records
from qa_deepspeed.qa.report.result import ResultBuilder
from qa_deepspeed.qa.report.samples import SAMPLES, Sample, sample_list, sample_numbers


@pytest.mark.parametrize("in_memory", [8192, 16])
def test_result_has_the_numbers_of_each_question(monkeypatch: pytest.MonkeyPatch, in_memory: int) -> None:
    """With records in memory and spilled to a file."""
    monkeypatch.setattr(records, "RECORDS_IN_MEMORY", in_memory)
    count = 50
    examples = [
        Example(f"q{n}", f"question {n}", f"{n // 5} yes no", (Answer("yes", 2),) if n % 3 else ())
        for n in range(count)
    ]
    texts = ["" if n % 2 else "yes" for n in range(count)]
    predictions = [
        Prediction(f"q{n}", text, columns_of([("no", 0.3, 1.0, 0.0, 6), (text, n / 64, 0.0, 0.0, 2)]), n - 20.0)
        for n, text in enumerate(texts)
    ]
    builder = ResultBuilder(True, "en", count)
    assert list(builder.observe(examples, iter(predictions), iter([1] * count))) == predictions
    result = builder.result(builder.metrics() | {"more": 1.0})
    expected = [text == ("yes" if n % 3 else "") for n, text in enumerate(texts)]
    assert result.correct.tolist() == expected
    assert result.has_answer.tolist() == [n % 3 > 0 for n in range(count)]
    assert result.confidence.tolist() == [n / 64 for n in range(count)]
    assert result.null_odds is not None and result.null_odds.tolist() == [n - 20.0 for n in range(count)]
    assert result.metrics["exact"] == 100 * np.mean(expected) and result.metrics["more"] == 1.0
    low, high = result.report["intervals"]["exact"]
    assert low <= result.metrics["exact"] <= high
    chosen = sorted(sample_numbers(count))
    assert result.samples == [
        Sample(f"question {n}", ("yes",) if n % 3 else (), texts[n], float(expected[n])) for n in chosen
    ]


def test_several_files_are_compared_with_intervals() -> None:
    examples = [Example(f"q{n}", "who?", f"{n} Ann", (Answer("Ann", 2),)) for n in range(30)]
    predictions = [
        Prediction(f"q{n}", text, columns_of([(text, 0.5, 1.0, 0.0, 2)]), None)
        for n, text in enumerate("Ann" if n % 5 else "Bob" for n in range(30))
    ]
    names, file_of_question = ("one.json", "other.json"), np.arange(30) // 12 > 0
    builder = ResultBuilder(False, "en", 30, None, names, file_of_question)
    list(builder.observe(examples, predictions, [1] * 30))
    result = builder.result(builder.metrics())
    assert result is not None
    by_file = result.report["slices"]["file"]
    assert {file: (cell["questions"], cell["exact"]) for file, cell in by_file.items()} == {
        "one.json": (12, pytest.approx(100 * 9 / 12)),
        "other.json": (18, pytest.approx(100 * 15 / 18)),
    }
    assert {file: cell["exact"] for file, cell in by_file.items()} == pytest.approx(
        {file: metrics["exact"] for file, metrics in result.metrics["files"].items()}
    )
    assert "intervals" in by_file["one.json"] and result.questions.files == list(names)


def test_very_many_files_are_listed_and_not_compared() -> None:
    count = 300
    examples = [Example(f"q{n}", "who?", f"{n} Ann", (Answer("Ann", 2),)) for n in range(count)]
    nbest = columns_of([("Ann", 0.5, 1.0, 0.0, 2)])
    builder = ResultBuilder(False, "en", count, None, [f"{n}.json" for n in range(count)], np.arange(count))
    list(builder.observe(examples, [Prediction(f"q{n}", "Ann", nbest, None) for n in range(count)], [1] * count))
    result = builder.result(builder.metrics())
    assert result is not None and "file" not in result.report["slices"] and len(result.questions.files) == count


def test_v1_data_has_no_null_odds() -> None:
    builder = ResultBuilder(False, "en", 1)
    example, nbest = Example("q", "who?", "Ann", (Answer("Ann", 0),)), columns_of([("Ann", 0.5, 1.0, 0.0, 0)])
    list(builder.observe([example], [Prediction("q", "Ann", nbest, None)], [1]))
    assert builder.result(builder.metrics()).null_odds is None


@pytest.mark.parametrize("count", [0, 1, SAMPLES - 1, SAMPLES, SAMPLES + 1, 1000])
def test_samples_are_spread_over_the_file(count: int) -> None:
    numbers = sample_numbers(count)
    assert len(numbers) == min(count, SAMPLES) and numbers <= set(range(count))
    assert not count or {0, count - 1} <= numbers


def test_sample_list_marks_right_and_wrong_answers() -> None:
    samples = [Sample("a?", ("x", "x"), "x", 1.0), Sample("b?", (), "y", 0.0), Sample("c?", ("x y",), "x", 2 / 3)]
    assert sample_list(samples).splitlines() == [
        "- **right** a?",
        "    - answer: x",
        "    - gold: x",
        "- **wrong** b?",
        "    - answer: y",
        "    - gold: *no answer*",
        "- **partly right (F1 0.67)** c?",
        "    - answer: x",
        "    - gold: x y",
    ]
