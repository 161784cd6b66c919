"""A model that was exported to ONNX, run by onnxruntime in place of the Transformers model it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from qa_deepspeed.inference.forward import chosen_device
from qa_deepspeed.models.loading import ONNX_FILE, holds_weights
from qa_deepspeed.qa.features.batching import RowLogits
from qa_deepspeed.utils.errors import UserError

INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "langs"})
"""Columns of a padded batch that an exported model may take, int64 `[rows, length]` each."""

OUTPUTS = ("start_logits", "end_logits")
"""What it gives, float32 `[rows, length]` each."""


def require_onnxruntime() -> Any:
    """The onnxruntime package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError("ONNX needs onnxruntime, which is not installed: pip install 'qa_deepspeed[onnx]'") from None
    return onnxruntime


def holds_onnx_model(name: str) -> bool:
    """Whether `name` is a folder with an exported model, and without weights for Transformers."""
    return (Path(name) / ONNX_FILE).is_file() and not holds_weights(name)


def onnx_device(device: torch.device | str | int | None) -> torch.device:
    """The CPU, on which exported models run.

    Raises:
        UserError: another device is asked for.
    """
    if device is not None and chosen_device(device).type != "cpu":
        raise UserError(f"an ONNX export runs on the CPU, not on '{device}': leave device out, or use the model itself")
    return torch.device("cpu")


class OnnxModel(torch.nn.Module):
    """An exported model with a span head; called as the Transformers model is, by the names of its inputs.

    Attributes:
        config: the model's config.
        columns: names of the inputs that it takes.
    """

    def __init__(self, session: Any, config: PretrainedConfig) -> None:
        """session: an `onnxruntime.InferenceSession` with some of `INPUTS` and all `OUTPUTS`."""
        super().__init__()
        self.config = config
        self.columns = frozenset(one.name for one in session.get_inputs())
        self._session = session

    def forward(self, **inputs: Tensor) -> RowLogits:
        """Start and end logits of padded rows; inputs that the model does not take are ignored."""
        given = {name: inputs[name].numpy() for name in self.columns}
        return RowLogits(*map(torch.from_numpy, self._session.run(OUTPUTS, given)))


def load_onnx_model(name: str, config: PretrainedConfig) -> OnnxModel:
    """The exported model in the folder `name`, run by as many threads as torch has now.

    Raises:
        UserError: onnxruntime is missing, or the file is damaged or not of such a model.
    """
    onnxruntime = require_onnxruntime()
    path = Path(name) / ONNX_FILE
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no other base class
        raise UserError(
            f"{path} cannot be read by onnxruntime: {str(error).splitlines()[0]}; export it again"
        ) from None
    unknown = sorted({one.name for one in session.get_inputs()} - INPUTS)
    missing = sorted(set(OUTPUTS) - {one.name for one in session.get_outputs()})
    if unknown or missing:
        problem = f"it takes {', '.join(unknown)}" if unknown else f"it gives no {' and no '.join(missing)}"
        raise UserError(f"{path} is no question-answering model that can be run: {problem}; see qa-deepspeed export")
    return OnnxModel(session, config)
