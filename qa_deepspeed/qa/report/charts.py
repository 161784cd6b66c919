"""The charts of an evaluation report, drawn by matplotlib: as SVG for the page, as pixels for TensorBoard.

matplotlib is imported inside the functions that draw: its import takes about half a second and 20 MiB, which commands
and ranks that draw nothing should not spend. Figures are created without pyplot, which would register them globally.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from qa_deepspeed.qa.report.words import SLICES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 640, 320
"""Pixels of a chart in TensorBoard; the SVG has the same proportions."""

PAGE_WIDTH = 460
"""Pixels of a chart that the page shows too: its text can be read on a narrow screen."""

DPI = 100
PLOT_AREA, PAGE_AREA = (0.11, 0.27, 0.85, 0.6), (0.16, 0.17, 0.78, 0.71)
"""Left, bottom, width and height of the axes as fractions of the figure. A fixed area needs no layout pass, and the
charts of all evaluations align."""

STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a "$" in a label is a dollar
    "svg.fonttype": "none",  # text stays text: small files that can be searched
    "svg.hashsalt": "qa_deepspeed",  # ids depend on the content alone: equal reports give equal bytes
    "font.sans-serif": "DejaVu Sans",  # comes with matplotlib; a browser without it takes its own sans-serif
    "font.size": 9,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.bottom": False,
    "ytick.left": False,
}

LABEL_CHARACTERS = 64
"""Characters that fit side by side under a chart in TensorBoard."""

Ticks = tuple[Sequence[float], Sequence[str]]
PERCENT_TICKS: Ticks = ((0.0, 0.25, 0.5, 0.75, 1.0), ("0%", "25%", "50%", "75%", "100%"))
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


THEME = {"fill: #ffffff": "fill: none", "#000000": "currentColor", "#dddddd": "var(--line)"}
"""Colours of the SVG that follow the page's theme, dark or light."""

CAPTIONS = {
    "calibration": "Bars: how often answers with this confidence are right. On the line, confidence is a probability; "
    "below it the model is too sure.",
    "precision_recall": "How much of what is answered is right (precision), and how much of what can be answered is "
    "answered (recall), when questions are answered in the order of their null odds.",
}
"""What a chart shows, by its name."""


def figures(report: Mapping[str, Any]) -> dict[str, Figure]:
    """The charts of a report (`Analysis.report`) by name; none that would have a single bar."""
    with _style():
        return _confidence_figures(report) | {
            f"by_{name}": _slice(name, values) for name, values in report["slices"].items() if len(values) > 1
        }


def page_figures(report: Mapping[str, Any]) -> list[tuple[str, str, Figure]]:
    """Name, caption and figure of the charts that the page shows."""
    with _style():
        return [(name, CAPTIONS[name], figure) for name, figure in _confidence_figures(report).items()]


def _confidence_figures(report: Mapping[str, Any]) -> dict[str, Figure]:
    drawn = {}
    if len(report["calibration"]["bins"]) > 1:
        drawn["calibration"] = _calibration(report["calibration"])
    if any(len(curve["recall"]) > 1 for curve in report.get("precision_recall", {}).values()):
        drawn["precision_recall"] = _precision_recall(report["precision_recall"])
    return drawn


def svg(name: str, figure: Figure) -> str:
    """The figure as an SVG element for an HTML page, in the colours of its theme; all text in it is escaped.

    Args:
        name: goes in front of every id, so that several figures can stand in one page.
    """
    file = io.StringIO()
    with _style():
        figure.savefig(file, format="svg", metadata=NO_METADATA)
    written = file.getvalue()
    element = written[written.index("<svg") :]  # an XML declaration and a doctype have no place inside HTML
    for colour, themed in THEME.items():
        element = element.replace(colour, themed)
    named = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", element)
    return named.replace("<svg ", f'<svg role="img" aria-label="{name.replace("_", " ")}" ', 1)


def pixels(figure: Figure) -> np.ndarray:
    """The figure as uint8 `[height, width, 3]`."""
    file = io.BytesIO()
    with _style():
        figure.savefig(file, format="rgba")
    width, height = (round(size) for size in figure.bbox.size)
    return np.frombuffer(file.getvalue(), np.uint8).reshape(height, width, 4)[:, :, :3]


@contextmanager
def _style() -> Iterator[None]:
    """Apply matplotlib's own defaults and STYLE instead of the user's matplotlibrc; restored at the end."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _axes(title: str, across: str, up: str, x_ticks: Ticks | None = None) -> tuple[Figure, Axes]:
    """A figure for the page with axes from 0 to 100%, or a wider one with other x_ticks."""
    from matplotlib.figure import Figure

    width, area = (PAGE_WIDTH, PAGE_AREA) if x_ticks is None else (WIDTH, PLOT_AREA)
    figure = Figure(figsize=(width / DPI, HEIGHT / DPI), dpi=DPI)
    axes = figure.add_axes(area)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=across, ylabel=up)
    axes.set_title(title, loc="left", fontsize=10, y=1.02)  # a fixed height saves a fifth of the drawing time
    axes.set_xticks(*(x_ticks or PERCENT_TICKS))
    axes.set_yticks(*PERCENT_TICKS)
    return figure, axes


def _calibration(found: Mapping[str, Any]) -> Figure:
    title = f"Is confidence right? (expected calibration error {found['expected_calibration_error']:.3f})"
    figure, axes = _axes(title, "confidence in the answer", "exact match")
    bins = found["bins"]
    begins = [one["from"] + 0.01 for one in bins]
    widths = [one["to"] - one["from"] - 0.02 for one in bins]
    axes.bar(begins, [one["accuracy"] for one in bins], widths, align="edge")
    axes.plot([0, 1], [0, 1], color="C1")
    return figure


CURVES = {"exact": "exact match", "f1": "F1", "oracle": "question is answerable"}
"""What counts as right, by the name of a curve."""


def _precision_recall(curves: Mapping[str, Any]) -> Figure:
    figure, axes = _axes("Precision and recall over the null odds", "recall", "precision")
    for name, curve in curves.items():
        label = f"{CURVES[name]} (average {curve['average_precision']:.1f})"
        axes.plot(curve["recall"], curve["precision"], label=label)
    axes.legend(loc="lower left", frameon=False)
    return figure


def _slice(name: str, values: Mapping[str, Mapping[str, Any]]) -> Figure:
    # one word a line, and a long one cut in the middle, so that long neighbours do not overlap
    most = max(LABEL_CHARACTERS // len(values), 8)
    words = {value: [_shortened(word, most) for word in value.split()][:2] for value in values}
    labels = ["\n".join([*words[value], f"{cell['questions']:,}"]) for value, cell in values.items()]
    places = list(range(len(values)))
    below = "value, and its number of questions; lines: 95% intervals"
    figure, axes = _axes(SLICES.get(name, name), below, "", (places, labels))
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.grid(False, axis="x")
    for offset, metric, label in ((-0.4, "exact", "EM"), (0.0, "f1", "F1")):
        scores = [cell[metric] / 100 for cell in values.values()]
        axes.bar([place + offset for place in places], scores, 0.38, align="edge", label=label)
        _draw_intervals(
            axes,
            offset + 0.19,
            [cell["intervals"][metric] if "intervals" in cell else None for cell in values.values()],
        )
    legend = {"ncols": 2, "frameon": False, "borderpad": 0, "handletextpad": 0.4, "columnspacing": 1.8}
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), **legend)
    return figure


def _shortened(word: str, most: int) -> str:
    return word if len(word) <= most else f"{word[: most // 2]}…{word[len(word) - most // 2 :]}"


def _draw_intervals(axes: Axes, offset: float, intervals: Sequence[Sequence[float] | None]) -> None:
    """A vertical line from low to high end, in percent, for every place that has an interval."""
    known = [(place + offset, *ends) for place, ends in enumerate(intervals) if ends]
    if known:
        across, low, high = zip(*known, strict=True)
        axes.vlines(across, [one / 100 for one in low], [one / 100 for one in high], color="#444444", linewidth=1)
