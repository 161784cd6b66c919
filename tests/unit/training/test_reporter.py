"""The report of an evaluation as a page and in TensorBoard: whole by itself, everything of the data escaped."""

import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.decoding.predictions import Prediction, columns_of
from qa_deepspeed.qa.metrics.squad import Gold, Scorer
from qa_deepspeed.qa.report.analysis import Analysis
from qa_deepspeed.qa.report.charts import figures
from qa_deepspeed.qa.report.page import markdown_parts, page
from qa_deepspeed.training.tensorboard import write_board
from qa_deepspeed.utils.files import write_json, write_text

HOSTILE = "<script>alert('x')</script> | \"&\" `b` \\"


@pytest.fixture(scope="module")
def report():
    scorer, analysis = Scorer(True), Analysis(True)
    for i in range(40):
        answers = (Answer("right", 0),) if i % 3 else ()
        example = Example(f"q{i}{HOSTILE}", f"what is {HOSTILE} \ud83d?", f"right or {HOSTILE} {i // 5}", answers)
        text = ["right", HOSTILE, ""][i % 4 % 3]
        nbest = [(text, i / 40, 1.0, 1.0, 9)]
        prediction = Prediction(example.example_id, text, columns_of(nbest), i - 20.0)
        gold = Gold(example.example_id, tuple(answer.text for answer in answers))
        scores = scorer.add(gold, text, prediction.null_odds, prediction.best_span_text)
        analysis.add(example, prediction, 1 + i % 2, *scores)
    return {"metrics": scorer.result(), **analysis.report(scorer.records())}


class Elements(HTMLParser):
    """Tags, their attributes and the text of a document."""

    def __init__(self, document):
        super().__init__()
        self.tags, self.attributes, self.cells = [], [], []
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


def test_the_page_needs_nothing_beside_it_and_runs_nothing(report, tmp_path):
    write_text(tmp_path / "report.html", page(report, f"Evaluation of {HOSTILE}"), errors="xmlcharrefreplace")
    found = Elements((tmp_path / "report.html").read_text(encoding="utf-8"))
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "table",
        "tr",
        "td",
        "th",
        "figure",
        "svg",
        "figcaption",
        "rect",
        "polyline",
        "text",
    }
    assert set(found.tags) <= allowed
    assert not {name for name, _ in found.attributes} & {"src", "href", "onload", "onclick"}
    assert found.tags.count("svg") == len(figures(report)) == 7
    assert any(HOSTILE in cell for cell in found.cells)
    numbers = dict(zip(found.cells[0::3], found.cells[1::3], strict=False))
    assert float(numbers["f1"]) == pytest.approx(report["metrics"]["f1"], abs=5e-4)


def test_figures_are_well_formed_and_inside_their_frame(report):
    for figure in figures(report).values():
        root = ElementTree.fromstring(figure.svg())
        width, height = (float(value) for value in root.get("viewBox").split()[2:])
        for rectangle in root.iter("{http://www.w3.org/2000/svg}rect"):
            x, y, w, h = (float(rectangle.get(name)) for name in ("x", "y", "width", "height"))
            assert min(x, y, w, h) >= 0 and x + w <= width and y + h <= height
        for line in root.iter("{http://www.w3.org/2000/svg}polyline"):
            points = np.array([[float(v) for v in point.split(",")] for point in line.get("points").split()])
            assert (points >= 0).all() and (points <= [width, height]).all()


def test_a_bar_is_as_high_as_its_score(report):
    figure = figures(report)["by_answerable"]
    heights = [height for *_, height, _ in figure.bars[-4:]]
    full = figure.place(0, 0)[1] - figure.place(0, 1)[1]
    scores = [cell[name] for cell in report["slices"]["answerable"].values() for name in ("exact", "f1")]
    assert [100 * height / full for height in heights] == pytest.approx(scores)


def test_tensorboard_shows_questions_as_they_are(report):
    """By TensorBoard's own Markdown: a list of three entries a mistake, and nothing of the data taken for marks."""
    from tensorboard.plugin_util import markdown_to_safe_html

    shown = markdown_to_safe_html(markdown_parts(report)["mistakes"])
    mistakes = report["mistakes"]
    assert shown.count("<ul>") == 1 + len(mistakes) and shown.count("<li>") == 3 * len(mistakes)
    assert "<script" not in shown and "<code" not in shown and shown.count("<strong>") == len(mistakes)
    text = " ".join("".join(ElementTree.fromstring(f"<div>{shown}</div>").itertext()).split())
    for mistake in mistakes:
        question = " ".join(mistake["question"].encode("utf-8", "replace").decode().split())
        assert f"{mistake['probability']:.3f} {question}" in text
    assert f"answer: {HOSTILE}" in text and "gold: no answer" in text
    scores = markdown_to_safe_html(markdown_parts(report)["scores"])
    assert scores.count("<tr>") == 1 + len(report["metrics"])


def test_tensorboard_has_the_figures_and_tables(report, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_json(tmp_path / "report.json", report)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report))
    write_board(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == {f"evaluation/{name}" for name in figures(report)}
    assert {"evaluation/scores/text_summary", "evaluation/mistakes/text_summary"} <= set(events.Tags()["tensors"])
