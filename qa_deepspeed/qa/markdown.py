"""Markdown as TensorBoard shows it: its tables break words in the middle, so questions stand in lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape

NO_ANSWER = "*no answer*"


def plain(text: str) -> str:
    """The text on one line, with nothing in it that Markdown or HTML would take for its own; "" is no answer."""
    whole = text.encode("utf-8", "replace").decode()  # halves of surrogate pairs are lost
    marked = re.sub(r"([\\`*_\[\]])", r"\\\1", " ".join(whole.split()))
    return escape(marked, quote=False) or NO_ANSWER


def question_list(questions: Iterable[tuple[str, str, Mapping[str, str]]]) -> str:
    """For each (mark, question, facts) an item: the mark and the question, below them the facts by name."""
    lines = []
    for mark, question, facts in questions:
        lines.append(f"- **{mark}** {plain(question)}")
        lines += [f"    - {name}: {fact}" for name, fact in facts.items()]
    return "\n".join(lines)
