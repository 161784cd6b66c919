"""Fine-tuning readers for extractive question answering with DeepSpeed, and answers from them.

`from qa_deepspeed import QuestionAnswerer` (or `pipeline`); importing the package alone loads nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qa_deepspeed.old_pipeline import pipeline
    from qa_deepspeed.predict import QuestionAnswerer

__all__ = ["QuestionAnswerer", "pipeline"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from qa_deepspeed import old_pipeline

        return getattr(old_pipeline, name)
    raise AttributeError(f"module 'qa_deepspeed' has no attribute '{name}'")
