"""TensorBoard: curves, the layout of the tab "Custom scalars", and the report of each evaluation.

A resumed run continues its curves where its checkpoint was: points of later steps, written by an earlier process, are
purged.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from qa_deepspeed.qa.report.charts import figures, pixels
from qa_deepspeed.qa.report.page import markdown_parts
from qa_deepspeed.qa.report.result import EvaluationResult
from qa_deepspeed.qa.report.samples import sample_list

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
        "MFU": ["Multiline", ["speed/mfu$"]],
        "padding": ["Multiline", ["speed/padding$"]],
        "memory, GiB": ["Multiline", ["memory/.*"]],
    },
}
"""The tab "Custom scalars": categories, charts, and the tags of their curves as regular expressions.

No two curves in a chart of evaluations: where each has one point, TensorBoard 2.21 draws neither.
"""

NOT_CURVES = re.compile(r"(epoch|total|not_scored|thresh|threshold)$|^eval/(un)?tuned_")
"""Values without a curve: counts, thresholds and scores on the way to a threshold, which would hide the scores among
them. metrics.jsonl has them all, the text `report/scores` those of the evaluation."""

OVERVIEW = {
    "train/loss": "Overview/1 loss",
    "eval/f1": "Overview/2 F1",
    "eval/loss": "Overview/3 development loss",
    "speed/tokens_per_second": "Overview/4 tokens per second",
    "speed/mfu": "Overview/5 MFU",
}
"""Curves that are shown once more at the top: TensorBoard sorts groups by name, capital letters first."""

RIGHT_CURVE = "report/precision and recall of right answers, by confidence"
ANSWERABLE_CURVE = "report/precision and recall of answerable questions, by null odds"
"""Tags in the tab "PR Curves", which shows nothing else of them."""

WRITER_THREADS = "tensorboard."
"""Beginning of the module names of the threads that write events."""

MAX_ODDS = 50.0
"""Null odds are shown up to this size: a question without any span has odds that are off the scale."""


def curves(values: Mapping[str, float]) -> dict[str, float]:
    """Of the values of an optimizer step those with a curve, by tag."""
    return {name: value for name, value in values.items() if not NOT_CURVES.search(name)}


class TensorBoard:
    """Writes a run's events into `tensorboard/` of its folder."""

    def __init__(self, output_dir: Path, done_steps: int) -> None:
        """done_steps: optimizer steps that are done; events of later steps are purged."""
        folder = output_dir / FOLDER
        used = folder.is_dir() and any(folder.iterdir())
        _silence_writer_threads()
        self._writer = SummaryWriter(str(folder), purge_step=done_steps + 1 if used else None)
        self._writer.add_custom_scalars(LAYOUT)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve (tags such as `train/loss`, but for `NOT_CURVES`), and flush."""
        for name, value in curves(values).items():
            self._writer.add_scalar(name, value, step)
            if name in OVERVIEW:
                self._writer.add_scalar(OVERVIEW[name], value, step)
        self._writer.flush()

    def evaluation(self, step: int, result: EvaluationResult) -> None:
        """Add an evaluation beside its scores (`show_evaluation`), and flush."""
        show_evaluation(self._writer, step, result)
        self._writer.flush()

    def end(self, hyperparameters: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Fill the tab "HParams": the run's hyperparameters and the curves that hold its final scores."""
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


_hook_before = threading.excepthook


def _silence_writer_threads() -> None:
    """No traceback from a thread that cannot write events: the next call of its writer raises the same error."""
    global _hook_before
    if threading.excepthook is not _report_others:
        _hook_before, threading.excepthook = threading.excepthook, _report_others


def _report_others(arguments: Any) -> None:
    writes_events = type(arguments.thread).__module__.startswith(WRITER_THREADS)
    if not (writes_events and isinstance(arguments.exc_value, OSError)):
        _hook_before(arguments)


def write_evaluation(output_dir: Path, result: EvaluationResult) -> None:
    """Write a TensorBoard file, in output_dir/tensorboard, of this evaluation alone."""
    _silence_writer_threads()
    with SummaryWriter(str(output_dir / FOLDER)) as writer:
        show_evaluation(writer, 0, result)


def show_evaluation(writer: SummaryWriter, step: int, result: EvaluationResult) -> None:
    """Add charts, tables, samples, histograms and precision-recall curves of an evaluation, all tagged `report/...`."""
    for name, figure in figures(result.report).items():
        writer.add_image(f"report/{name}", pixels(figure), step, dataformats="HWC")
    for name, text in markdown_parts(result.report).items():
        writer.add_text(f"report/{name}", text, step)
    writer.add_text("report/samples", sample_list(result.samples), step)
    for name, chosen in (("right", result.correct), ("wrong", ~result.correct)):
        if chosen.any():
            writer.add_histogram(f"report/answer_probability_if_{name}", result.confidence[chosen], step)
    writer.add_pr_curve(RIGHT_CURVE, result.correct, result.confidence, step)
    if result.null_odds is not None:
        odds = np.clip(result.null_odds, -MAX_ODDS, MAX_ODDS)
        for name, chosen in (("answerable", result.has_answer), ("unanswerable", ~result.has_answer)):
            if chosen.any():
                writer.add_histogram(f"report/null_odds_if_{name}", odds[chosen], step)
        writer.add_pr_curve(ANSWERABLE_CURVE, result.has_answer, 1 / (1 + np.exp(odds)), step)
