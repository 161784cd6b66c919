"""The two things every stage speaks of: a question about a text, and an answer to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """A gold answer. `start` counts characters (code points) of the context.

    `start` is -1 where the text is known but was not found in the context at a certain place: such an answer
    serves for scoring only. It is -2 in `NO_GOLD` alone.
    """

    text: str
    start: int


NO_GOLD = (Answer("", -2),)
"""The answers of a question whose gold answers are not known: it is answered, and not scored."""


@dataclass(frozen=True, slots=True)
class Example:
    """A question about a context.

    No answers means that the context does not answer it, `NO_GOLD` that its gold answers are not known.

    Questions of one paragraph come one after another and share one `context` object.
    """

    example_id: str
    question: str
    context: str
    answers: tuple[Answer, ...] = ()

    @property
    def has_gold(self) -> bool:
        """Whether the gold answers are known, so that an answer can be scored."""
        return self.answers != NO_GOLD
