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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 640, 320
"""Pixels of a chart in TensorBoard; the SVG has the same proportions."""

DPI = 100
PLOT_AREA = (0.11, 0.23, 0.85, 0.64)
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

Ticks = tuple[Sequence[float], Sequence[str]]
PERCENT_TICKS: Ticks = ((0.0, 0.25, 0.5, 0.75, 1.0), ("0%", "25%", "50%", "75%", "100%"))
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def figures(report: Mapping[str, Any]) -> dict[str, Figure]:
    """The charts of a report (`Analysis.report`) by name."""
    with _style():
        drawn = {"calibration": _calibration(report["calibration"])}
        if "precision_recall" in report:
            drawn["precision_recall"] = _precision_recall(report["precision_recall"])
        return drawn | {f"by_{name}": _slice(name, values) for name, values in report["slices"].items()}


def svg(name: str, figure: Figure) -> str:
    """The figure as an SVG element for an HTML page; all text in it is escaped.

    Args:
        name: goes in front of every id, so that several figures can stand in one page.
    """
    file = io.StringIO()
    with _style():
        figure.savefig(file, format="svg", metadata=NO_METADATA)
    written = file.getvalue()
    element = written[written.index("<svg") :]  # an XML declaration and a doctype have no place inside HTML
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", element)


def pixels(figure: Figure) -> np.ndarray:
    """The figure as uint8 `[height, width, 3]`."""
    file = io.BytesIO()
    with _style():
        figure.savefig(file, format="rgba")
    return np.frombuffer(file.getvalue(), np.uint8).reshape(HEIGHT, WIDTH, 4)[:, :, :3]


@contextmanager
def _style() -> Iterator[None]:
    """Apply matplotlib's own defaults and STYLE instead of the user's matplotlibrc; restored at the end."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _axes(title: str, across: str, up: str, x_ticks: Ticks = PERCENT_TICKS) -> tuple[Figure, Axes]:
    """A figure with axes from 0 to 100%, or with other x_ticks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
    axes = figure.add_axes(PLOT_AREA)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=across, ylabel=up)
    axes.set_title(title, loc="left", fontsize=10, y=1.02)  # a fixed height saves a fifth of the drawing time
    axes.set_xticks(*x_ticks)
    axes.set_yticks(*PERCENT_TICKS)
    return figure, axes


def _calibration(found: Mapping[str, Any]) -> Figure:
    title = f"Calibration (expected calibration error {found['expected_calibration_error']:.3f})"
    figure, axes = _axes(title, "confidence in the answer", "exact match")
    bins = found["bins"]
    begins = [one["from"] + 0.01 for one in bins]
    widths = [one["to"] - one["from"] - 0.02 for one in bins]
    axes.bar(begins, [one["accuracy"] for one in bins], widths, align="edge")
    axes.plot([0, 1], [0, 1], color="C1")
    return figure


def _precision_recall(curves: Mapping[str, Any]) -> Figure:
    figure, axes = _axes("Precision and recall over the null odds", "recall", "precision")
    for name, curve in curves.items():
        axes.plot(curve["recall"], curve["precision"], label=f"{name} (average {curve['average_precision']:.1f})")
    axes.legend(loc="lower left", frameon=False)
    return figure


def _slice(name: str, values: Mapping[str, Mapping[str, Any]]) -> Figure:
    # one word a line, so that long neighbours do not overlap
    labels = ["\n".join([*value.split(), f"{cell['questions']:,}"]) for value, cell in values.items()]
    places = list(range(len(values)))
    title = f"Scores by {name.replace('_', ' ')} (lines: 95% intervals; below: number of questions)"
    figure, axes = _axes(title, "", "", (places, labels))
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
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderpad=0)
    return figure


def _draw_intervals(axes: Axes, offset: float, intervals: Sequence[Sequence[float] | None]) -> None:
    """A vertical line from low to high end, in percent, for every place that has an interval."""
    known = [(place + offset, *ends) for place, ends in enumerate(intervals) if ends]
    if known:
        across, low, high = zip(*known, strict=True)
        axes.vlines(across, [one / 100 for one in low], [one / 100 for one in high], color="#444444", linewidth=1)
