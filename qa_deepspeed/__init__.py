"""Fine-tuning of models for extractive question answering with DeepSpeed, and answers from them.

`from qa_deepspeed import QuestionAnswerer` (or `pipeline`); importing the package alone loads nothing heavy.
Imports: inference, when a name is used.
Start reading: cli/main.py for the commands, training/train.py for a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qa_deepspeed.inference.answerer import QuestionAnswerer
    from qa_deepspeed.inference.pipeline import pipeline

__all__ = ["QuestionAnswerer", "pipeline"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from qa_deepspeed.inference import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'qa_deepspeed' has no attribute '{name}'")
