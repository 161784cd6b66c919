"""The report as a self-contained page and in Markdown, with all text of the data escaped."""

from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from qa_deepspeed.qa.report.charts import figures
from qa_deepspeed.qa.report.page import markdown_parts, page
from qa_deepspeed.utils.files import write_text
from tests.unit.qa.report.reports import HOSTILE, hostile_report


@pytest.fixture(scope="module")
def report():
    return hostile_report()


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


def test_page_is_self_contained_and_runs_no_script(report, tmp_path):
    write_text(tmp_path / "report.html", page(report, f"Evaluation of {HOSTILE}"), errors="xmlcharrefreplace")
    found = Elements((tmp_path / "report.html").read_text(encoding="utf-8"))
    page_tags = "html head meta title style body h1 h2 table tr td th figure"
    svg_tags = "svg defs g path text clippath rect use"
    assert set(found.tags) <= {*page_tags.split(), *svg_tags.split()}
    assert not {name for name, _ in found.attributes if name in ("src", "href") or name.startswith("on")}
    assert all(value.startswith("#") for name, value in found.attributes if name == "xlink:href")
    ids = Counter(value for name, value in found.attributes if name == "id")
    assert max(ids.values()) == 1, "ids are unique over all charts of the page"
    assert found.tags.count("svg") == len(figures(report)) == 7
    assert any(HOSTILE in cell for cell in found.cells)
    numbers = dict(zip(found.cells[0::3], found.cells[1::3], strict=False))
    assert float(numbers["f1"]) == pytest.approx(report["metrics"]["f1"], abs=5e-4)


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
    assert f"answer: {HOSTILE}" in text and "gold: no answer" in text
    scores = markdown_to_safe_html(markdown_parts(report)["scores"])
    assert scores.count("<tr>") == 1 + len(report["metrics"])
