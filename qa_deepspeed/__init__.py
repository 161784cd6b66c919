"""Fine-tuning of models for extractive question answering with DeepSpeed, and answers from them.

`from qa_deepspeed import train, evaluate, QuestionAnswerer`; importing the package alone loads nothing heavy: each name
is loaded when it is used.
Imports: training, inference, config and utils, when a name is used.
Start reading: cli/main.py for the commands, training/train.py for a run, training/api.py for calls from Python.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qa_deepspeed.config.run_options import RunOptions
    from qa_deepspeed.inference.answerer import QuestionAnswerer
    from qa_deepspeed.inference.pipeline import pipeline
    from qa_deepspeed.training.api import RunResult, evaluate, train
    from qa_deepspeed.training.stopping import Preempted
    from qa_deepspeed.utils.errors import LostRankError, StorageError, UserError

__version__ = "0.1.0"
"""The version; setup.cfg reads it here."""

__all__ = [
    "LostRankError",
    "Preempted",
    "QuestionAnswerer",
    "RunOptions",
    "RunResult",
    "StorageError",
    "UserError",
    "evaluate",
    "pipeline",
    "train",
]

_MODULE_OF = {
    "LostRankError": "utils.errors",
    "Preempted": "training.stopping",
    "QuestionAnswerer": "inference.answerer",
    "RunOptions": "config.run_options",
    "RunResult": "training.api",
    "StorageError": "utils.errors",
    "UserError": "utils.errors",
    "evaluate": "training.api",
    "pipeline": "inference.pipeline",
    "train": "training.api",
}
"""Name -> module of the package that defines it; __all__ and the imports for type checkers list the same."""


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'qa_deepspeed' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"qa_deepspeed.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
