"""`qa-deepspeed export MODEL OUT --format onnx`: a trained model for onnxruntime, compared with the model."""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from qa_deepspeed.cli.data.sample import make_corpora
from qa_deepspeed.cli.inference.export_folder import export_folder, place
from qa_deepspeed.engine.checkpoints.checkpoint_files import MODEL_FOLDER
from qa_deepspeed.inference.answerer import QuestionAnswerer
from qa_deepspeed.inference.onnx_export import (
    TOLERANCE,
    AnswerComparison,
    compare_answers,
    load_exportable,
    logits_difference,
    quantize_onnx_model,
    require_onnx,
    trace_batch,
    write_onnx_model,
)
from qa_deepspeed.models.loading import ONNX_FILE
from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.data.reading import DataSource, ReadReport, read_examples, resolve_files
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.supported import installed_version

QUESTIONS_COMPARED = 64
"""Questions whose logits are compared at most."""

SAMPLE_ARTICLES = 6
"""Articles of the sample corpus whose questions are compared where no file is given."""


def export_onnx(arguments: argparse.Namespace) -> None:
    """Export, quantize if asked to, compare, print.

    Raises:
        UserError: the model cannot be exported, its export gives other logits or costs too much F1, or `out` holds
            something; then `out` is as it was.
    """
    require_onnx()
    model, out = arguments.checkpoint, arguments.out
    if (model / MODEL_FOLDER / "config.json").is_file():
        raise UserError(f"{model} is a checkpoint: make a model of it first (qa-deepspeed export {model} MODEL)")
    asked = _questions(arguments.predict_file) if arguments.predict_file else []
    if arguments.quantize and not any(example.has_gold for example in asked):
        raise UserError(f"{arguments.predict_file} has no gold answers: what --quantize costs in F1 cannot be measured")
    with export_folder(out) as aside:
        original = load_exportable(str(model))
        shown = asked[:QUESTIONS_COMPARED] or _sample_questions()
        exported, record = _export_float32(original, shown, aside)
        if arguments.quantize:
            record["quantize"] = arguments.quantize
            exported, record["quantized_difference"] = _quantize(original, shown, aside)
        lines = [f"{out} holds {model} as {ONNX_FILE} ({_size(aside)}): {_compared(record)}"]
        if asked:
            answers = compare_answers(original, exported, asked)
            lines.append(_described(answers))
            _refuse_loss(answers, arguments.max_f1_loss)
            record["answers"] = vars(answers)
        place(aside, out, {"model": str(model.resolve() if model.is_dir() else model), **record})
    dist.log0("\n".join(lines))


def _export_float32(
    original: QuestionAnswerer, shown: list[Example], folder: Path
) -> tuple[QuestionAnswerer, dict[str, Any]]:
    """Export into `folder`, open the export and compare logits on the questions `shown`; returns it and the record.

    Raises:
        UserError: logits differ.
    """
    write_onnx_model(original.model, trace_batch(original, shown), folder)
    original.model.config.save_pretrained(folder)
    original.tokenizer.save_pretrained(folder)
    exported = QuestionAnswerer.from_pretrained(str(folder))
    difference, windows = logits_difference(original, exported, shown)
    if not difference <= TOLERANCE:
        raise UserError(
            f"the export would give other answers than the model: logits differ by {difference:.2e}, {TOLERANCE:.0e} "
            "is allowed; nothing was written"
        )
    versions = {name: installed_version(name) for name in ("torch", "transformers", "onnx", "onnxruntime")}
    compared = {"windows": windows, "largest_difference": difference, "tolerance": TOLERANCE}
    return exported, {"format": "onnx", **compared, **versions}


def _quantize(original: QuestionAnswerer, shown: list[Example], folder: Path) -> tuple[QuestionAnswerer, float]:
    """Quantize the export in `folder`; returns it and the largest difference of its logits from the model's."""
    quantize_onnx_model(folder)
    exported = QuestionAnswerer.from_pretrained(str(folder))
    return exported, logits_difference(original, exported, shown)[0]


def _size(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.glob(f'{ONNX_FILE}*')) / 2**20:,.1f} MiB"


def _compared(record: dict[str, Any]) -> str:
    """How much the logits differ."""
    text = f"logits of {record['windows']} windows within {record['largest_difference']:.1e}"
    if "quantize" in record:
        text += f" in float32, {record['quantized_difference']:.1e} in {record['quantize']}"
    return text


def _described(answers: AnswerComparison) -> str:
    """One line: equal answers, and the scores before and after."""
    parts = [f"{answers.equal:,} of {answers.questions:,} answers are equal"]
    for name, scores in (("F1", answers.f1), ("EM", answers.exact)):
        if scores is not None:
            parts.append(f"{name} {scores[0]:.2f} before, {scores[1]:.2f} after")
    return "; ".join(parts if answers.f1 else [*parts, "the file has no gold answers to score them by"])


def _refuse_loss(answers: AnswerComparison, limit: float) -> None:
    """Raise UserError if the export costs more points of F1 than `limit`."""
    if answers.f1_loss > limit:
        raise UserError(
            f"the export costs {answers.f1_loss:.2f} points of F1, more than {limit:g}; nothing was written "
            f"({_described(answers)}); --max_f1_loss allows more"
        )


def _questions(file: str) -> list[Example]:
    """The questions of a file, with their gold answers if it has any."""
    source = DataSource(resolve_files([file]), "evaluate", version_2_with_negative=True)
    report = ReadReport()
    found = [example for example in read_examples(source, report) if example.context]
    if not found:
        raise UserError(f"{file}: nothing to answer ({report.summary()})")
    if report.rejected:
        print("\n".join([report.summary(), *report.left_out()]), file=sys.stderr)
    return found


def _sample_questions() -> list[Example]:
    """Questions of the quickstart's corpus."""
    articles: list[dict[str, Any]] = make_corpora(seed=42, train_articles=0, dev_articles=SAMPLE_ARTICLES)[1]["data"]
    found = (
        Example(question["id"], question["question"], paragraph["context"])
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    )
    return list(islice(found, QUESTIONS_COMPARED))
