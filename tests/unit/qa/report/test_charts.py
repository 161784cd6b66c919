"""The charts: heights equal scores; SVG is small, deterministic and safe inside a page; drawing imports lazily."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from qa_deepspeed.qa.report.charts import HEIGHT, PAGE_WIDTH, WIDTH, figures, page_figures, pixels, svg
from tests.unit.qa.report.reports import hostile_report

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return hostile_report()


def test_bar_heights_equal_scores(report: dict[str, Any]) -> None:
    (axes,) = figures(report)["by_answerable"].axes
    heights = [100 * bar.get_height() for container in axes.containers for bar in container]
    cells = report["slices"]["answerable"].values()
    assert heights == pytest.approx([cell[name] for name in ("exact", "f1") for cell in cells])
    assert [label.get_text().split("\n") for label in axes.get_xticklabels()] == [
        [name, str(cell["questions"])] for name, cell in report["slices"]["answerable"].items()
    ]


def test_lines_on_the_bars_are_the_intervals(report: dict[str, Any]) -> None:
    cells = {
        "few": {"questions": 3, "exact": 10.0, "f1": 20.0},
        "many": {"questions": 90, "exact": 40.0, "f1": 50.0, "intervals": {"exact": [30.0, 45.0], "f1": [41.0, 60.0]}},
    }
    (axes,) = figures({**report, "slices": {"kind": cells}})["by_kind"].axes
    lines = [segment for collection in axes.collections for segment in collection.get_segments()]
    bars = [bar for container in axes.containers for bar in container][1::2]
    for line, bar, (low, high) in zip(lines, bars, ([0.3, 0.45], [0.41, 0.6]), strict=True):
        middle = bar.get_x() + bar.get_width() / 2
        np.testing.assert_allclose(line, [[middle, low], [middle, high]])


def test_curves_equal_the_report(report: dict[str, Any]) -> None:
    (axes,) = figures(report)["precision_recall"].axes
    for line, curve in zip(axes.lines, report["precision_recall"].values(), strict=True):
        np.testing.assert_allclose(line.get_xdata(), curve["recall"])
        np.testing.assert_allclose(line.get_ydata(), curve["precision"])
    (bins,) = figures(report)["calibration"].axes[0].containers
    assert [bar.get_height() for bar in bins] == [one["accuracy"] for one in report["calibration"]["bins"]]


def test_svg_is_deterministic_and_small(report: dict[str, Any]) -> None:
    once, again = ({name: svg(name, figure) for name, figure in figures(report).items()} for _ in range(2))
    assert once == again and len(once) == 5
    assert sum(map(len, once.values())) < 150_000
    assert "DejaVu" in once["calibration"] and ">confidence in the answer</text>" in once["calibration"]


def test_matplotlibrc_of_the_user_changes_nothing(report: dict[str, Any]) -> None:
    plain = svg("x", figures(report)["calibration"])
    with matplotlib.rc_context({"axes.facecolor": "black", "svg.fonttype": "path", "figure.dpi": 30}):
        before = dict(matplotlib.rcParams)
        assert svg("x", figures(report)["calibration"]) == plain
        assert dict(matplotlib.rcParams) == before


def test_texts_are_escaped_and_not_parsed_as_math(report: dict[str, Any]) -> None:
    cell = {"questions": 1, "exact": 50.0, "f1": 60.0}
    name = "$x_1$</script>&"  # short enough to be shown whole
    figure = figures({**report, "slices": {"kind": {name: cell, "other": cell}}})["by_kind"]
    root = ElementTree.fromstring(svg("x", figure))
    assert not list(root.iter(f"{SVG}script"))
    texts = ["".join(text.itertext()) for text in root.iter() if text.tag in (f"{SVG}text", f"{SVG}tspan")]
    assert any(name in text for text in texts)


def test_charts_fit_their_frame(report: dict[str, Any]) -> None:
    """The border is white, the inside is not."""
    for name, figure in figures(report).items():
        image = pixels(figure)
        width = WIDTH if name.startswith("by_") else PAGE_WIDTH
        assert image.shape == (HEIGHT, width, 3) and image.dtype == np.uint8
        for border in (image[:2], image[-2:], image[:, :2], image[:, -2:]):
            assert (border == 255).all()
        assert (image < 128).any()


def test_no_chart_has_a_single_bar(report: dict[str, Any]) -> None:
    one_bin = {**report["calibration"], "bins": report["calibration"]["bins"][:1]}
    curves = {name: {**curve, "recall": [], "precision": []} for name, curve in report["precision_recall"].items()}
    slices = {"windows": {"1": report["slices"]["windows"]["1"]}, "answerable": report["slices"]["answerable"]}
    bare = {**report, "calibration": one_bin, "precision_recall": curves, "slices": slices}
    assert list(figures(bare)) == ["by_answerable"] and page_figures(bare) == []


def test_colours_follow_the_theme_of_the_page(report: dict[str, Any]) -> None:
    for name, caption, figure in page_figures(report):
        drawn = svg(name, figure)
        assert "currentColor" in drawn and "var(--line)" in drawn and caption
        assert not {"#ffffff", "#000000", "#dddddd"} & set(re.findall("#[0-9a-f]{6}", drawn))


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, qa_deepspeed.qa.report.page; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
