"""TensorBoard events read back: curves, resuming without overlap, what an evaluation shows; metrics.jsonl with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.decoding.predictions import DecodeSettings, Prediction, columns_of, write_predictions
from qa_deepspeed.qa.report.charts import figures
from qa_deepspeed.qa.report.samples import SAMPLES, EvaluationView, view_evaluation
from qa_deepspeed.training.reporter import MetricsLogger
from qa_deepspeed.training.tensorboard import LAYOUT, write_board
from qa_deepspeed.utils.files import write_json
from tests.unit.qa.report.reports import hostile_report

CONTEXTS = [f"Paragraph {number} names the number {number} and nothing | else." for number in range(8)]


class Examples:
    """As much of an example store as is asked for."""

    def __init__(self, examples: list[Example]) -> None:
        self._examples = examples
        self.ids = [example.example_id for example in examples]

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


class Store:
    def __init__(self, count: int) -> None:
        self.examples = Examples(
            [
                Example(f"q{n}", f"Which number, {n}?", CONTEXTS[n % 8], (Answer(str(n % 8), 10),) if n % 3 else ())
                for n in range(count)
            ]
        )


@pytest.fixture
def view(tmp_path: Path) -> EvaluationView:
    store: Any = Store(50)
    predictions = [
        Prediction(
            example.example_id, text := "" if n % 2 else str(n % 8), columns_of([(text, 0.75, 1.0, 0.0, 3)]), n - 20.0
        )
        for n, example in enumerate(store.examples)
    ]
    write_predictions(iter(predictions), tmp_path, DecodeSettings(version_2_with_negative=True))
    return view_evaluation(tmp_path, store, True, "en")


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    found.Reload()
    return found


def test_a_resumed_run_continues_its_curves_without_overlap(tmp_path: Path) -> None:
    first = MetricsLogger(tmp_path, 10, 0)
    for step in range(1, 8):
        first.log(step, {"train/loss": float(step)}, "")
    first.close()
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 8, "tr')  # cut off in mid-line
    again = MetricsLogger(tmp_path, 10, 4)
    for step in range(5, 11):
        again.log(step, {"train/loss": 100.0 + step}, "")
    again.close()
    expected = [(step, float(step)) for step in range(1, 5)] + [(step, 100.0 + step) for step in range(5, 11)]
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("train/loss")] == expected
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == expected


def test_a_run_that_starts_over_without_a_checkpoint_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        reporter = MetricsLogger(tmp_path, 10, 0)
        reporter.log(1, {"train/loss": value}, "")
        reporter.close()
    assert [event.value for event in events(tmp_path).Scalars("train/loss")] == [2.0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_an_evaluation_is_shown_question_by_question(tmp_path: Path, view: EvaluationView) -> None:
    reporter = MetricsLogger(tmp_path, 10, 0)
    reporter.log(5, {"eval/f1": 40.0, "eval/exact": 30.0}, "")
    reporter.evaluation(5, lambda: view)
    reporter.end({"learning_rate": 1e-3, "deepspeed_config": None}, {"f1": 40.0, "exact": 30.0})
    reporter.close()
    found = events(tmp_path)
    right, wrong = (found.Histograms(f"answer probability/{name}")[0].histogram_value for name in ("right", "wrong"))
    assert right.num == view.scores.exact.sum() and wrong.num == 50 - right.num
    assert {f"null odds/{name}" for name in ("answerable", "unanswerable")} <= set(found.Tags()["histograms"])
    tags = found.Tags()["tensors"]
    assert "answer is right, by its probability" in tags and "question has an answer, by its null odds" in tags
    (text,) = found.Tensors("answers/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert shown.count("- **") == SAMPLES and "Which number, 49?" in shown and "answer: *no answer*" in shown
    hyper = found.summary_metadata["_hparams_/session_start_info"]
    assert b"learning_rate" in hyper.plugin_data.content
    curve = layout_pb2.Layout.FromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in curve.category] == list(LAYOUT)


def test_the_view_holds_what_the_files_say(view: EvaluationView) -> None:
    assert view.confidence.tolist() == [0.75] * 50 and view.null_odds is not None
    assert view.null_odds.tolist() == [n - 20.0 for n in range(50)]
    expected = [float((n % 3 == 0) == (n % 2 == 1) and (n % 2 == 1 or n % 3 > 0)) for n in range(50)]
    np.testing.assert_array_equal(view.scores.exact, expected)
    assert len(set(view.scores.paragraph.tolist())) == 8
    low, high = view.scores.intervals()["f1"]
    assert low <= 100 * view.scores.f1.mean() <= high


def test_a_report_shows_its_figures_and_tables(tmp_path: Path) -> None:
    report = hostile_report()
    write_json(tmp_path / "report.json", report)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report))
    write_board(tmp_path)
    tags = events(tmp_path).Tags()
    assert set(tags["images"]) == {f"evaluation/{name}" for name in figures(report)}
    assert {"evaluation/scores/text_summary", "evaluation/mistakes/text_summary"} <= set(tags["tensors"])
