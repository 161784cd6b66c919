"""Inputs of a `QuestionAnswerer`: checks of its arguments, and the forms in which questions are passed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from numbers import Integral
from typing import Any

import numpy as np

from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.utils.errors import UserError

AnswerFunction = Callable[[list[Example]], Iterator[Any]]
"""Gives the results of some questions, in their order."""

QUESTIONS_AT_ONCE = 4096
"""Questions read from an iterator before they are sorted by length and answered."""

IGNORED_ARGUMENTS = {"padding", "num_workers"}
"""Arguments of the pipeline that are accepted and ignored: rows are always padded to the longest of their batch."""


def require_known_arguments(function: str, given: Iterable[str], known: Iterable[str], ignored: set[str]) -> None:
    """Refuse unknown arguments, with the known one that is probably meant.

    Raises:
        TypeError: `given` has a name that is neither known nor ignored.
    """
    known = set(known)
    for name in sorted(set(given) - known - ignored):
        nearest = difflib.get_close_matches(name, sorted(known), n=1)
        meant = f"; did you mean '{nearest[0]}'?" if nearest else ""
        raise TypeError(f"{function} takes no argument '{name}'{meant}")


def require_whole_number(name: str, value: Any, least: int, optional: bool = True) -> None:
    """Raise UserError, naming the argument, unless `value` is a whole number from `least` on, or an optional None."""
    if value is None and optional:
        return
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UserError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise UserError(f"{name} must be at least {least}, not {value}")


def require_truth(name: str, value: Any) -> None:
    """Raise UserError, naming the argument, unless `value` is True, False or None."""
    if value is not None and not isinstance(value, (bool, np.bool_)):
        raise UserError(f"{name} must be True or False, not {value!r}")


def for_each_question(answer: AnswerFunction, inputs: tuple[Any, ...], question: Any, context: Any) -> Any:
    """Results in the form of the inputs: one result, a list, or an iterator."""
    if len(inputs) == 1 and isinstance(inputs[0], Iterator):
        return _streamed(answer, inputs[0])
    rows = _rows(inputs, question, context)
    results = list(answer([_example(number, row) for number, row in enumerate(rows)]))
    return results[0] if len(results) == 1 else results


def _streamed(answer: AnswerFunction, rows: Iterator[Any]) -> Iterator[Any]:
    numbered = (_example(number, row) for number, row in enumerate(rows))
    while examples := list(islice(numbered, QUESTIONS_AT_ONCE)):
        yield from answer(examples)


def _rows(inputs: tuple[Any, ...], question: Any, context: Any) -> list[Any]:
    """The inputs as (question, context) dicts or Examples."""
    if inputs:
        if len(inputs) == 2 and all(isinstance(one, str) for one in inputs):
            return [{"question": inputs[0], "context": inputs[1]}]
        given = inputs[0] if len(inputs) == 1 else list(inputs)
        return list(given) if isinstance(given, Iterable) and not isinstance(given, (Mapping, str)) else [given]
    if isinstance(question, str) and isinstance(context, str):
        return [{"question": question, "context": context}]
    if isinstance(question, (list, tuple)) and isinstance(context, (str, list, tuple)):
        contexts = [context] * len(question) if isinstance(context, str) else context
        if len(contexts) != len(question):
            raise UserError(f"{len(question)} questions but {len(contexts)} contexts: give one context or one for each")
        return [{"question": one, "context": other} for one, other in zip(question, contexts, strict=True)]
    raise UserError(
        "pass question= and context=, each a string or a list, or a dict with these keys, or a list of them"
    )


def _example(number: int, row: Any) -> Example:
    """Input `number` as an Example."""
    if isinstance(row, Example):
        return row
    if not isinstance(row, Mapping):
        raise UserError(f"input {number} is a {type(row).__name__}, not a dict with the keys question and context")
    for name in ("question", "context"):
        text = row.get(name)
        if not isinstance(text, str) or not text:
            raise UserError(f"input {number} has no {name}: it must be a string that is not empty")
    return Example(str(row.get("id", number)), row["question"], row["context"])
