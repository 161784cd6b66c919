"""`pipeline`: creates a QuestionAnswerer with the arguments of the question-answering pipeline of Transformers 4."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from qa_deepspeed.inference.answerer import QuestionAnswerer, as_tokenizer, call_arguments
from qa_deepspeed.inference.inputs import IGNORED_ARGUMENTS, require_known_arguments
from qa_deepspeed.inference.settings import SPELLINGS
from qa_deepspeed.utils.errors import UserError

IGNORED_AT_CREATION = {"framework", "use_fast"}
"""Arguments that are accepted and ignored: PyTorch is the only framework, Transformers 5 has one kind of tokenizer."""


class _AnswererWithDefaults(QuestionAnswerer):
    """Takes arguments of its calls when it is created, as the pipeline of Transformers did."""

    defaults: dict[str, Any]

    def __call__(self, *inputs: Any, **arguments: Any) -> Any:
        """Answer questions as `QuestionAnswerer` does; `arguments` override the defaults."""
        return super().__call__(*inputs, **(self.defaults | _in_one_spelling(arguments)))


def _in_one_spelling(arguments: dict[str, Any]) -> dict[str, Any]:
    return {SPELLINGS.get(name, name): value for name, value in arguments.items()}


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
    """Replacement for `transformers.pipeline("question-answering", ...)`: only the import changes.

    Args:
        model: folder, hub name, or a loaded model; a loaded model needs `tokenizer` too.
        tokenizer: folder, hub name, or a loaded tokenizer; default: the one in the model's folder.
        torch_dtype: former name of dtype.
        call: defaults for the arguments of the answerer's calls.
    Raises:
        UserError: another task, no model, or a loaded model without a tokenizer.
        TypeError: an unknown argument.
    """
    if task != "question-answering":
        raise UserError(f"this pipeline is for 'question-answering' only, not for '{task}'")
    known = call_arguments()
    own = inspect.signature(pipeline).parameters.keys() - {"call"}
    require_known_arguments("pipeline", call, known | own, IGNORED_ARGUMENTS | IGNORED_AT_CREATION)
    if isinstance(model, str):
        answerer = _AnswererWithDefaults.from_pretrained(
            model, tokenizer=tokenizer, device=device, dtype=dtype or torch_dtype, batch_size=batch_size
        )
    elif model is None or tokenizer is None:
        raise UserError("model is required: pass a folder or hub name, or a loaded model together with tokenizer=")
    else:
        answerer = _AnswererWithDefaults(model, as_tokenizer(tokenizer), device=device, batch_size=batch_size)
    answerer.defaults = _in_one_spelling({name: value for name, value in call.items() if name in known})
    return answerer
