"""`pipeline`: makes a QuestionAnswerer as Transformers 4 made its question-answering pipeline."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from qa_deepspeed.inference.answerer import WITHOUT_EFFECT, QuestionAnswerer, as_tokenizer
from qa_deepspeed.utils.errors import UserError

MAKING_WITHOUT_EFFECT = {"framework", "use_fast"}
"""What has nothing left to choose from: there is PyTorch, and the tokenizers that Transformers 5 has."""


class _Preset(QuestionAnswerer):
    """Has arguments for every call that does not give them itself, as the pipeline took them when it was made."""

    preset: dict[str, Any]

    def __call__(self, *inputs: Any, **arguments: Any) -> Any:
        """As QuestionAnswerer's."""
        return super().__call__(*inputs, **(self.preset | arguments))


def pipeline(
    task: str = "question-answering",
    model: Any = None,
    *,
    tokenizer: Any = None,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    batch_size: int | None = None,
    **call: Any,
) -> QuestionAnswerer:
    """What `transformers.pipeline` was for question answering, so that only the import changes.

    Args:
        model: folder, hub name, or a model, which then needs its tokenizer too.
        tokenizer: as model; left out, that of the model's folder.
        torch_dtype: the older name of dtype.
        call: arguments of the answerer's calls, for those that do not give them.
    Raises:
        UserError: another task, no model, or none of its tokenizer.
    """
    if task != "question-answering":
        raise UserError(f"this pipeline is for 'question-answering' only, not for '{task}'")
    known = inspect.signature(QuestionAnswerer.__call__).parameters.keys() - {"self", "inputs", "others"}
    unknown = call.keys() - known - WITHOUT_EFFECT - MAKING_WITHOUT_EFFECT
    if unknown:
        raise TypeError(f"pipeline takes no argument '{sorted(unknown)[0]}'")
    if isinstance(model, str):
        made = _Preset.from_pretrained(
            model, tokenizer=tokenizer, device=device, dtype=dtype or torch_dtype, batch_size=batch_size
        )
    elif model is None or tokenizer is None:
        raise UserError("which model? pass model= as a folder or hub name, or a loaded model together with tokenizer=")
    else:
        made = _Preset(model, as_tokenizer(tokenizer), device=device, batch_size=batch_size)
    made.preset = {name: value for name, value in call.items() if name in known}
    return made
