"""Export of a trained model to ONNX by torch's exporter, and its comparison with the model on real questions."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qa_deepspeed.inference.answerer import QuestionAnswerer
from qa_deepspeed.inference.forward import batches_of, changes_in_forward
from qa_deepspeed.inference.onnx_model import OUTPUTS, OnnxModel, require_onnxruntime
from qa_deepspeed.models.loading import ONNX_FILE
from qa_deepspeed.models.lora import adapted_modules
from qa_deepspeed.models.packing import real_logits, rows_to_try
from qa_deepspeed.models.trained_settings import stored_settings
from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.features.batching import Batch
from qa_deepspeed.qa.metrics.squad import Gold, score
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import apply_umask, move_files

TOLERANCE = 1e-4
"""Largest allowed difference of a logit of the float32 export; relative to the largest logit if that exceeds 1."""

WINDOWS_COMPARED = 64
"""Windows whose logits are compared at most."""

OPSET = 18
"""Version of ONNX's operators: the one that torch's exporter writes without conversion."""

PATTERN_OF_CAUSE = re.compile(r"^<class '.*?'>: (.+)$", re.MULTILINE)
"""The cause of a failure in the long message of torch's exporter."""


def require_onnx() -> None:
    """Check that the packages of the extra `[onnx]` are there.

    Raises:
        UserError: one is not installed.
    """
    try:
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"export to ONNX needs {error.name}, which is not installed: pip install 'qa_deepspeed[onnx]'"
        ) from None
    require_onnxruntime()


def load_exportable(name: str) -> QuestionAnswerer:
    """The model `name` in float32 on the CPU, its LoRA adapters merged into its weights.

    Raises:
        UserError: it cannot be loaded, or is of a kind that cannot be exported.
    """
    answerer = QuestionAnswerer.from_pretrained(name, device="cpu", dtype="float32")
    if isinstance(answerer.model, OnnxModel):
        raise UserError(f"{name} is an ONNX export already: name the model it was made of")
    if answerer.windows.head.null_score_is_odds:
        raise UserError(
            f"{name} cannot be exported to ONNX: its beam head searches for spans itself and gives no start and end "
            "logit of each token; use the model itself"
        )
    if changes_in_forward(answerer.model):
        raise UserError(
            f"{name} cannot be exported to ONNX: its rotary embeddings change with the length of the rows, and an "
            "exported graph is fixed"
        )
    for module in adapted_modules(answerer.model):
        module.merge()
    return answerer


class _SpanModel(torch.nn.Module):
    """A model that takes its inputs by position, in the order of `names`, and gives `OUTPUTS`."""

    def __init__(self, model: torch.nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(**dict(zip(self.names, inputs, strict=True)))
        return outputs.start_logits, outputs.end_logits


def write_onnx_model(model: torch.nn.Module, batch: Batch, folder: Path) -> None:
    """Write `model` as `ONNX_FILE` into `folder`, for any number of rows of any length.

    Weights of more than 2 GB are in a file beside it, as the format demands.

    Args: batch: at least two rows with padding, on which the model is traced.
    Raises:
        UserError: torch cannot export a model of this kind.
    """
    names = list(batch.inputs)
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with _quiet():
            program = torch.onnx.export(
                _SpanModel(model, names).eval(),
                tuple(batch.inputs.values()),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=names,
                output_names=list(OUTPUTS),
                dynamic_shapes=(tuple(any_size for _ in names),),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = PATTERN_OF_CAUSE.search(str(error))
        reason = cause.group(1) if cause else str(error).splitlines()[0]
        kind = type(model).__name__
        raise UserError(f"a {kind} cannot be exported to ONNX: torch's exporter stops ({reason})") from None
    assert program is not None
    program.save(folder / ONNX_FILE)
    _apply_umask(folder)


def quantize_onnx_model(folder: Path) -> None:
    """Replace the products with weights in the exported model of `folder` by products of integers.

    Weights have a scale for each output, activations one that is computed in each pass (dynamic quantization).
    Embeddings stay in float32. Weights have 7 bits: with 8, sums of two products overflow on CPUs without VNNI.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / ONNX_FILE
    in_two_files = len(list(folder.glob(f"{ONNX_FILE}*"))) > 1
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        with _quiet():
            quantize_dynamic(
                path,
                Path(aside) / ONNX_FILE,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=in_two_files,
            )
        for old in folder.glob(f"{ONNX_FILE}*"):
            old.unlink()
        move_files(Path(aside), folder)
    _apply_umask(folder)


def _apply_umask(folder: Path) -> None:
    for path in folder.glob(f"{ONNX_FILE}*"):
        apply_umask(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the warnings and remarks of torch's exporter and of onnxruntime's quantization are not shown.

    They are for authors of models, and a failure raises.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def trace_batch(answerer: QuestionAnswerer, examples: Sequence[Example]) -> Batch:
    """Rows of several lengths, to trace a model on."""
    store = answerer.features(examples)
    return answerer.windows.batch(store, rows_to_try(store.lengths))


@torch.inference_mode()
def logits_difference(
    original: QuestionAnswerer, exported: QuestionAnswerer, examples: Sequence[Example]
) -> tuple[float, int]:
    """Largest difference of the logits of two models on the windows of some questions, and the number of windows.

    The difference is relative to the largest logit if that exceeds 1; NaN if a logit is.

    Args: examples: at least one.
    """
    store = original.features(examples)
    largest, windows = [0.0], 0
    for rows in batches_of(store.lengths[:WINDOWS_COMPARED], None, original.device):
        batch = original.windows.batch(store, rows)
        expected, found = (real_logits(one.model(**batch.inputs), batch) for one in (original, exported))
        largest.append(float((found - expected).abs().max()) / max(1.0, float(expected.abs().max())))
        windows += len(rows)
    return float(np.max(largest)), windows


@dataclass(frozen=True)
class AnswerComparison:
    """Answers of a model and of its export to the same questions.

    exact and f1: of the model and of its export, in percent; None where no question has gold answers.
    """

    questions: int
    equal: int
    exact: tuple[float, float] | None
    f1: tuple[float, float] | None

    @property
    def f1_loss(self) -> float:
        """Points of F1 that the export costs; 0 where it is unknown."""
        return 0.0 if self.f1 is None else self.f1[0] - self.f1[1]


def compare_answers(
    original: QuestionAnswerer, exported: QuestionAnswerer, examples: Sequence[Example]
) -> AnswerComparison:
    """Answer all questions by both, as `predict` does by default, and score the answers."""
    texts = [_answers(one, examples) for one in (original, exported)]
    equal = sum(texts[0][example_id] == text for example_id, text in texts[1].items())
    golds = [Gold(one.example_id, tuple(answer.text for answer in one.answers)) for one in examples if one.has_gold]
    if not golds:
        return AnswerComparison(len(examples), equal, None, None)
    language = stored_settings(original.model.config).get("metric_language", "en")
    before, after = (score(golds, answers, language=language) for answers in texts)
    return AnswerComparison(len(examples), equal, (before["exact"], after["exact"]), (before["f1"], after["f1"]))


def _answers(answerer: QuestionAnswerer, examples: Sequence[Example]) -> dict[str, str]:
    """The answer to each question, by its id."""
    found: Any = answerer(iter(examples), progress=True)
    return {example.example_id: one["answer"] for example, one in zip(examples, found, strict=True)}
