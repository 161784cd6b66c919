"""The two things every stage speaks of: a question about a text, and an answer to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """A gold answer. `start` counts characters (code points) of the context.

    `start` is -1 where the text is known but was not found in the context at a certain place: such an answer
    serves for scoring only.
    """

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Example:
    """A question about a context. No answers means that the context does not answer it.

    Questions of one paragraph come one after another and share one `context` object.
    """

    example_id: str
    question: str
    context: str
    answers: tuple[Answer, ...] = ()
