"""TensorBoard: curves, a layout that puts the first questions first, and what an evaluation shows beside its scores.

A resumed run goes on where its checkpoint was: what an earlier process wrote for later steps is purged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from qa_deepspeed.qa.report.charts import figures, pixels
from qa_deepspeed.qa.report.page import REPORT_FILE, markdown_parts
from qa_deepspeed.qa.report.samples import EvaluationView

FOLDER = "tensorboard"

LAYOUT = {
    "Is it learning": {
        "loss": ["Multiline", ["train/loss$"]],
        "F1": ["Multiline", ["eval/f1$"]],
        "exact match": ["Multiline", ["eval/exact$"]],
        "answerable and unanswerable": ["Multiline", ["eval/HasAns_f1$", "eval/NoAns_f1$", "eval/best_f1$"]],
        "gradient norm": ["Multiline", ["train/grad_norm$"]],
        "learning rate": ["Multiline", ["train/learning_rate$"]],
    },
    "Is it fast": {
        "questions per second": ["Multiline", ["speed/questions_per_second$"]],
        "tokens per second": ["Multiline", ["speed/tokens_per_second$"]],
        "share of padding": ["Multiline", ["speed/padding$"]],
        "memory, GiB": ["Multiline", ["memory/.*"]],
    },
}
"""The tab "Custom scalars": categories, charts, and the tags of their curves as regular expressions.

Not two curves in a chart of evaluations: where each has one point, TensorBoard 2.21 draws neither.
"""


class TensorBoard:
    """Writes a run's events into `tensorboard/` of its folder."""

    def __init__(self, output_dir: Path, done_steps: int) -> None:
        """done_steps: optimizer steps that the run has behind it; events of later steps are purged."""
        folder = output_dir / FOLDER
        used = folder.is_dir() and any(folder.iterdir())
        self._writer = SummaryWriter(str(folder), purge_step=done_steps + 1 if used else None)
        self._writer.add_custom_scalars(LAYOUT)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve (tags such as `train/loss`), and put all on disk."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def evaluation(self, step: int, view: EvaluationView) -> None:
        """Add histograms, precision-recall curves and the same questions' answers as every time."""
        right = view.scores.exact > 0
        for name, chosen in (("right", right), ("wrong", ~right)):
            if chosen.any():
                self._writer.add_histogram(f"answer probability/{name}", view.confidence[chosen], step)
        self._writer.add_pr_curve("answer is right, by its probability", right, view.confidence, step)
        has_answer = view.scores.has_answer
        if view.null_odds is not None:
            shown = np.clip(view.null_odds, -50, 50)  # what has no span at all has odds without a scale
            for name, chosen in (("answerable", has_answer), ("unanswerable", ~has_answer)):
                if chosen.any():
                    self._writer.add_histogram(f"null odds/{name}", shown[chosen], step)
            answerable = 1 / (1 + np.exp(shown))
            self._writer.add_pr_curve("question has an answer, by its null odds", has_answer, answerable, step)
        self._writer.add_text("answers", view.listing(), step)
        self._writer.flush()

    def report(self, step: int, report: Mapping[str, Any]) -> None:
        """Add an evaluation's report: its figures and tables."""
        show_report(self._writer, report, step)
        self._writer.flush()

    def end(self, hyperparameters: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Tell the tab "HParams" what the run was and which curves hold its final scores."""
        values = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in hyperparameters.items()
        }
        finals = {f"eval/{name}": float(metrics[name]) for name in ("exact", "f1", "best_f1") if name in metrics}
        events = self._writer.file_writer
        assert events is not None, "the writer is open"
        for summary in hparams(values, finals):
            events.add_summary(summary)
        self._writer.flush()

    def close(self) -> None:
        """End the event file."""
        self._writer.close()


def show_report(writer: Any, report: Mapping[str, Any], step: int) -> None:
    """Add a report (`Analysis.report` with `metrics`) to a SummaryWriter at this step."""
    for name, figure in figures(report).items():
        writer.add_image(f"evaluation/{name}", pixels(figure), step, dataformats="HWC")
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
