"""The report of an evaluation in TensorBoard: its figures as images, its scores and mistakes as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qa_deepspeed.answers import REPORT_FILE
from qa_deepspeed.qa.charts import BLACK, GREY, HEIGHT, WIDTH, Figure, figures
from qa_deepspeed.qa.report_page import markdown_parts

TITLE_HEIGHT = 28
FONT_PIXELS = 17
"""Large: TensorBoard shows images at half their size, dropping pixels."""
MARGIN = 8
ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}
"""Pillow's names for where a text stands about its point."""


def show_report(writer: Any, report: Mapping[str, Any], step: int) -> None:
    """Add a report (`Analysis.report` with `metrics`) to a SummaryWriter at this step."""
    for name, figure in figures(report).items():
        writer.add_image(f"evaluation/{name}", _pixels(figure), step, dataformats="HWC")
    for name, text in markdown_parts(report).items():
        writer.add_text(f"evaluation/{name}", text, step)


def read_report(output_dir: Path) -> dict[str, Any]:
    """The report of the evaluation that wrote into `output_dir`."""
    return json.loads((output_dir / REPORT_FILE).read_text(encoding="utf-8"))


def write_board(output_dir: Path) -> None:
    """A TensorBoard file, in output_dir/tensorboard, of the report in `output_dir` alone."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(output_dir / "tensorboard")) as writer:
        show_report(writer, read_report(output_dir), 0)


def _pixels(figure: Figure) -> np.ndarray:
    """uint8 `[height, width, 3]`; the title stands above the figure."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (WIDTH, HEIGHT + TITLE_HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_PIXELS)
    for points in figure.grid:
        draw.line([(x, y + TITLE_HEIGHT) for x, y in points], fill=GREY)
    for x, y, width, height, colour in figure.bars:
        draw.rectangle([x, y + TITLE_HEIGHT, x + width, y + height + TITLE_HEIGHT], fill=colour)
    for points, colour in figure.lines:
        draw.line([(x, y + TITLE_HEIGHT) for x, y in points], fill=colour, width=2)
    for x, y, text, anchor in figure.texts:
        draw.text((x, y + TITLE_HEIGHT), text, fill=BLACK, font=font, anchor=ANCHORS[anchor])
    wide = draw.textlength(figure.title, font) / (WIDTH - 2 * MARGIN)
    title_font = ImageFont.load_default(FONT_PIXELS / max(1.0, wide))
    draw.text((MARGIN, TITLE_HEIGHT - MARGIN), figure.title, fill=BLACK, font=title_font, anchor=ANCHORS["start"])
    return np.asarray(image)
