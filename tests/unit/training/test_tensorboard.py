"""TensorBoard events read back: the report of an evaluation, and the layout of the curves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tensorboard.plugins.custom_scalar import layout_pb2

from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.decoding.predictions import Prediction, columns_of
from qa_deepspeed.qa.report.charts import figures
from qa_deepspeed.qa.report.result import EvaluationResult, ResultBuilder
from qa_deepspeed.qa.report.samples import SAMPLES
from qa_deepspeed.training.reporting.reporter import MetricsLogger
from qa_deepspeed.training.reporting.tensorboard import ANSWERABLE_CURVE, LAYOUT, RIGHT_CURVE, write_evaluation
from tests.unit.training.events import events

CONTEXTS = [f"Paragraph {number} names the number {number} and nothing | else." for number in range(8)]


@pytest.fixture
def result() -> EvaluationResult:
    examples = [
        Example(f"q{n}", f"Which number, {n}?", CONTEXTS[n % 8], (Answer(str(n % 8), 10),) if n % 3 else ())
        for n in range(50)
    ]
    predictions = [
        Prediction(
            example.example_id, text := "" if n % 2 else str(n % 8), columns_of([(text, 0.75, 1.0, 0.0, 3)]), n - 20.0
        )
        for n, example in enumerate(examples)
    ]
    builder = ResultBuilder(True, "en", len(examples))
    assert list(builder.observe(examples, predictions, [1] * 50)) == predictions
    return builder.result(builder.metrics())


def test_evaluation_shows_probabilities_odds_and_samples(tmp_path: Path, result: EvaluationResult) -> None:
    logger = MetricsLogger(tmp_path, 10, 0)
    logger.log(5, {"eval/f1": 40.0, "eval/exact": 30.0}, "")
    logger.evaluation(5, result)
    logger.end({"learning_rate": 1e-3, "deepspeed_config": None}, {"f1": 40.0, "exact": 30.0})
    logger.close()
    found = events(tmp_path)
    tags = found.Tags()
    right, wrong = (
        found.Histograms(f"report/answer_probability_if_{name}")[0].histogram_value for name in ("right", "wrong")
    )
    assert right.num == result.correct.sum() and wrong.num == 50 - right.num
    assert {f"report/null_odds_if_{name}" for name in ("answerable", "unanswerable")} <= set(tags["histograms"])
    assert {RIGHT_CURVE, ANSWERABLE_CURVE} <= set(tags["tensors"])
    (text,) = found.Tensors("report/samples/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert shown.count("- **") == SAMPLES and "Which number, 49?" in shown and "answer: *no answer*" in shown
    hyper = found.summary_metadata["_hparams_/session_start_info"]
    assert b"learning_rate" in hyper.plugin_data.content


def test_the_first_group_is_loss_f1_tokens_and_mfu(tmp_path: Path, result: EvaluationResult) -> None:
    """TensorBoard sorts groups by name, capital letters first; curves keep their own tags beside."""
    names = ["train/loss", "eval/f1", "eval/loss", "speed/tokens_per_second", "speed/mfu"]
    values = {name: 1.0 + place for place, name in enumerate([*names, "memory/gpu_GiB", "eval/exact"])}
    logger = MetricsLogger(tmp_path, 10, 0)
    logger.log(5, values, "")
    logger.evaluation(5, result)
    logger.close()
    found = events(tmp_path)
    tags = [tag for kind in ("scalars", "images", "histograms") for tag in found.Tags()[kind]]
    shown = sorted(tags)[:5]
    assert shown == [
        "Overview/1 loss",
        "Overview/2 F1",
        "Overview/3 development loss",
        "Overview/4 tokens per second",
        "Overview/5 MFU",
    ]
    for tag, name in zip(shown, names, strict=True):
        assert [event.value for event in found.Scalars(tag)] == [values[name]]
    assert set(values) <= set(found.Tags()["scalars"])


def test_layout_uses_the_tag_prefixes(tmp_path: Path) -> None:
    MetricsLogger(tmp_path, 10, 0).close()
    (stored,) = events(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(stored.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(LAYOUT)
    tags = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    assert tags and all(re.match("(train|eval|speed|memory)/", tag) for tag in tags)


def test_evaluation_alone_shows_charts_and_tables(tmp_path: Path, result: EvaluationResult) -> None:
    write_evaluation(tmp_path, result)
    tags = events(tmp_path).Tags()
    assert set(tags["images"]) == {f"report/{name}" for name in figures(result.report)}
    assert {f"report/{name}/text_summary" for name in ("scores", "mistakes", "samples")} <= set(tags["tensors"])
    shown = [tag for kind in ("images", "histograms", "scalars") for tag in tags[kind]]
    assert all(tag.startswith("report/") for tag in shown)
