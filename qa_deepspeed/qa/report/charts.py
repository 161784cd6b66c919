"""The figures of an evaluation report as simple shapes, and the shapes as SVG. Coordinates are pixels, y downwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 50, 20, 30, 60  # margins of the plot within the figure
COLOURS = ("#1f77b4", "#ff7f0e", "#7f7f7f")
GREY, BLACK = "#bbbbbb", "#222222"

LETTER = 10
"""Pixels of a letter where a legend is drawn largest, on average."""

Point = tuple[float, float]


@dataclass
class Figure:
    """Shapes in the order of drawing: grid, (x, y, width, height, colour) bars, (points, colour) lines, texts."""

    title: str
    grid: list[list[Point]] = field(default_factory=list)
    lines: list[tuple[list[Point], str]] = field(default_factory=list)
    bars: list[tuple[float, float, float, float, str]] = field(default_factory=list)
    texts: list[tuple[float, float, str, str]] = field(default_factory=list)  # x, baseline, text, start|middle|end

    def place(self, x: float, y: float) -> Point:
        """The pixel of a point of the plot, whose axes run from 0 to 1."""
        return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)

    def axes(self, across: str, up: str) -> None:
        """Frame, grid and percent signs of axes from 0 to 1; `across` may be empty where bars are named."""
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            self.grid.append([self.place(0, tick), self.place(1, tick)])
            self.texts.append((LEFT - 6, self.place(0, tick)[1] + 4, f"{tick:.0%}", "end"))
            if across:
                self.texts.append((self.place(tick, 0)[0], HEIGHT - BOTTOM + 16, f"{tick:.0%}", "middle"))
        self.texts.append((WIDTH / 2, HEIGHT - BOTTOM + 36, across, "middle"))
        self.texts.append((LEFT, TOP - 10, up, "start"))

    def bar(self, x: float, width: float, height: float, colour: str) -> None:
        """A bar from the bottom, in the plot's units."""
        left, top = self.place(x, height)
        right, bottom = self.place(x + width, 0)
        self.bars.append((left, top, right - left, bottom - top, colour))

    def legend(self, names: Sequence[str]) -> None:
        """Names in the colours of COLOURS, above the plot on the right."""
        x = WIDTH - RIGHT
        for name, colour in reversed(list(zip(names, COLOURS, strict=False))):
            self.texts.append((x, TOP - 10, name, "end"))
            x -= LETTER * len(name) + 18
            self.bars.append((x, TOP - 18, 8, 8, colour))
            x -= 14

    def svg(self) -> str:
        """The figure as an SVG element; every text is escaped."""
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" font-family="sans-serif" font-size="12">'
        ]
        parts.append(f"<title>{escape(self.title)}</title>")
        parts += [_polyline(points, GREY) for points in self.grid]
        for x, y, width, height, colour in self.bars:
            parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>')
        parts += [_polyline(points, colour) for points, colour in self.lines]
        for x, y, text, anchor in self.texts:
            parts.append(f'<text x="{x:.1f}" y="{y:.1f}" fill="{BLACK}" text-anchor="{anchor}">{escape(text)}</text>')
        return "\n".join([*parts, "</svg>"])


def _polyline(points: Sequence[Point], colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def figures(report: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of a report (`Analysis.report`) by name."""
    drawn = {"calibration": _calibration(report["calibration"])}
    if "precision_recall" in report:
        drawn["precision_recall"] = _precision_recall(report["precision_recall"])
    return drawn | {f"by_{name}": _slice(name, values) for name, values in report["slices"].items()}


def _calibration(found: Mapping[str, Any]) -> Figure:
    figure = Figure(f"Calibration (expected calibration error {found['expected_calibration_error']:.3f})")
    figure.axes("confidence in the answer", "answers that are exactly right")
    for one in found["bins"]:
        figure.bar(one["from"] + 0.01, one["to"] - one["from"] - 0.02, one["accuracy"], COLOURS[0])
    figure.lines.append(([figure.place(0, 0), figure.place(1, 1)], COLOURS[1]))
    return figure


def _precision_recall(curves: Mapping[str, Any]) -> Figure:
    areas = ", ".join(f"{name} {curve['average_precision']:.1f}" for name, curve in curves.items())
    figure = Figure(f"Precision and recall over the null odds (average precision: {areas})")
    figure.axes("recall", "precision")
    figure.legend(list(curves))
    for curve, colour in zip(curves.values(), COLOURS, strict=True):
        points = [figure.place(x, y) for x, y in zip(curve["recall"], curve["precision"], strict=True)]
        figure.lines.append((points, colour))
    return figure


def _slice(name: str, values: Mapping[str, Mapping[str, float]]) -> Figure:
    figure = Figure(f"Scores by {name.replace('_', ' ')}")
    figure.axes("", "")
    figure.legend(["EM", "F1"])
    width = 1 / len(values)
    for number, (value, cell) in enumerate(values.items()):
        for which, metric in enumerate(("exact", "f1")):
            x = (number + 0.1 + 0.4 * which) * width
            figure.bar(x, 0.38 * width, cell[metric] / 100, COLOURS[which])
        middle = figure.place((number + 0.5) * width, 0)[0]
        lines = [*value.split(), f"{cell['questions']:,}"]  # words below each other: neighbours do not touch
        for line, text in enumerate(lines):
            figure.texts.append((middle, HEIGHT - BOTTOM + 18 * (line + 1), text, "middle"))
    return figure
