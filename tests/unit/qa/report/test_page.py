"""The report as a self-contained page and in Markdown, with all text of the data escaped."""

import base64
import hashlib
import json
import re
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.decoding.predictions import Prediction, columns_of
from qa_deepspeed.qa.metrics.by_file import flat_metrics
from qa_deepspeed.qa.report.page import markdown_parts, page, score_cards
from qa_deepspeed.qa.report.questions import PAGE_BYTES
from qa_deepspeed.qa.report.result import ResultBuilder
from qa_deepspeed.utils.files import write_text
from tests.unit.qa.report.reports import HOSTILE, hostile_report, hostile_result

ABOUT = {"Model": f"model {HOSTILE}", "Command": "qa-deepspeed evaluate"}


@pytest.fixture(scope="module")
def report():
    return hostile_report()


class Elements(HTMLParser):
    """Tags, their attributes, and the content of scripts."""

    def __init__(self, document):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.in_script = [], [], [], False
        self.feed(document)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.in_script = tag == "script"
        if self.in_script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.in_script = False

    def handle_data(self, data):
        if self.in_script:
            self.scripts[-1] += data


PAGE_TAGS = (
    "html head meta title style body a h1 h2 h3 header main section div p dl dt dd ul li table caption thead tbody tr "
    "th td figure figcaption details summary code span noscript form label input select option button nav script"
)
SVG_TAGS = "svg defs g path text clippath rect use"


def test_page_is_self_contained_and_runs_its_own_script_alone(tmp_path):
    result = hostile_result()
    document = page(result.report, result.questions, f"Evaluation of {HOSTILE}", ABOUT)
    write_text(tmp_path / "report.html", document, errors="xmlcharrefreplace")
    found = Elements((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert set(found.tags) <= {*PAGE_TAGS.split(), *SVG_TAGS.split()}
    assert not {name for name, _ in found.attributes if name == "src" or name.startswith("on")}
    assert all(value.startswith("#") for name, value in found.attributes if name in ("href", "xlink:href"))
    ids = Counter(value for name, value in found.attributes if name == "id")
    assert max(ids.values()) == 1, "ids are unique over all charts of the page"
    data, script = found.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(value for name, value in found.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    rows = json.loads(data)["rows"]
    assert [row[0] for row in rows] == [f"q{number}{HOSTILE}" for number in range(40)]
    title = re.search("<h1>(.*)</h1>", document)
    assert title is not None and unescape(title.group(1)) == f"Evaluation of {HOSTILE}"


MARKUP = ("</script><script>alert(1)</script>", "<!--<script>", "]]>", "<img src=x onerror=alert(1)>", "{{ 7 }}")
TEXT = st.text(max_size=30) | st.sampled_from([*MARKUP, "\ud800"])


@settings(max_examples=20, deadline=None)
@given(TEXT, TEXT, TEXT, TEXT, TEXT)
def test_no_text_of_the_data_is_markup(example_id, question, context, answer, name):
    """Whatever the texts hold, the page has the same elements, and its data are the texts."""
    found = []
    for values in ((example_id, question, context, answer, name), ("q", "what?", "Ann met Bob", "Ann", "dev.json")):
        builder = ResultBuilder(False, "en", 1, None, (values[4],), np.zeros(1, int))
        example = Example(values[0], values[1], values[2], (Answer(values[3], -1),))
        prediction = Prediction(values[0], "unlike", columns_of([("unlike", 0.5, 1.0, 1.0, 0)]), None)
        list(builder.observe([example], [prediction], [1]))
        result = builder.result(builder.metrics())
        about = {"Model": values[4], "Data": values[4]}
        found.append(Elements(page(result.report, result.questions, values[4], about)))
    assert found[0].tags == found[1].tags
    shown = json.loads(found[0].scripts[0])
    expected = [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in (example_id, question)]
    assert shown["rows"][0][:2] == expected
    assert found[0].scripts[1] == found[1].scripts[1]


def test_the_first_screen_has_scores_in_words_and_no_raw_key(report):
    cards = score_cards(report)
    metrics = report["metrics"]
    assert [card["name"] for card in cards] == ["F1", "Exact match", "Answerable questions", "Unanswerable questions"]
    values = [metrics[name] for name in ("f1", "exact", "HasAns_f1", "NoAns_f1")]
    assert [float(card["value"]) for card in cards] == pytest.approx(values, abs=0.05)
    low, high = report["intervals"]["f1"]
    assert cards[0]["interval"] == f"95% interval {low:.1f} to {high:.1f}"
    result = hostile_result()
    document = page(result.report, result.questions, "Evaluation", ABOUT)
    first_screen = document.split("<body>")[1].split('id="questions"')[0]
    assert not [name for name in metrics if "_" in name and name in first_screen]


def test_a_page_of_very_many_questions_stays_small():
    builder = ResultBuilder(True, "en", 8000)
    context = "Ann met Bob in the old town of Rome, as she had done every year. " * 40

    def rows():
        for number in range(8000):
            text = context + str(number // 4)
            gold = (Answer("Ann", 0),) if number % 3 else ()
            yield Example(f"question-{number:024}", f"Whom did Ann meet in year {number}?", text, gold)

    nbest = columns_of([("Bob", 0.5, 1.0, 1.0, 8), ("", 0.2, 1.0, 1.0, -1), ("Rome", 0.1, 1.0, 1.0, 31)])
    predictions = (Prediction(example.example_id, "Bob", nbest, 0.0) for example in rows())
    for _ in builder.observe(rows(), predictions, [1] * 8000):
        pass
    result = builder.result(builder.metrics())
    document = page(result.report, result.questions, "Evaluation", {})
    assert 0.85 * PAGE_BYTES < len(document.encode()) < PAGE_BYTES
    assert f"{len(result.questions):,} of 8,000 questions are listed, so that this page stays under 5 MB" in document


def test_tensorboard_renders_texts_literally(report):
    """By TensorBoard's own Markdown: three list entries per mistake, and no text of the data taken for markup."""
    from tensorboard.plugin_util import markdown_to_safe_html

    shown = markdown_to_safe_html(markdown_parts(report)["mistakes"])
    mistakes = report["mistakes"]
    assert shown.count("<ul>") == 1 + len(mistakes) and shown.count("<li>") == 3 * len(mistakes)
    assert "<script" not in shown and "<code" not in shown and shown.count("<strong>") == len(mistakes)
    text = " ".join("".join(ElementTree.fromstring(f"<div>{shown}</div>").itertext()).split())
    for mistake in mistakes:
        question = " ".join(mistake["question"].encode("utf-8", "replace").decode().split())
        assert f"{mistake['probability']:.3f} {question}" in text
    assert f"answer: {' '.join(HOSTILE.split())}" in text and "gold: no answer" in text
    scores = markdown_to_safe_html(markdown_parts(report)["scores"])
    assert scores.count("<tr>") == 1 + len(flat_metrics(report["metrics"])) and "<code" not in scores
