"""The questions of the report's page, as JSON inside its HTML: all of them, or as many as fit.

Where not all fit, questions that are answered wrong come first; among equals a hash of the id decides, so that the
chosen ones are spread over the data. Memory is bounded by the size of the page, not by the number of questions.
"""

from __future__ import annotations

import heapq
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qa_deepspeed.qa.data.examples import Answer

PAGE_BYTES = 5_000_000
"""No page is larger, so that browsers open it at once."""

TABLE_BYTES = 4_500_000
"""Of these, what the questions and their contexts may take; charts, styles and script take less than the rest."""

NBEST_SHOWN = 5
"""Entries of an n-best list on the page; nbest_predictions.json has them all."""

CONTEXT_CHARACTERS = 6000
"""A longer context is cut to this length around its answers."""

CONTEXT_BEFORE = 1000
"""Characters of a cut context before the first answer."""

TEXT_CHARACTERS = 2000
"""A longer question, or answer that does not stand in the shown context, is cut to this length."""

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class GivenAnswer:
    """The answer of one system.

    start: the character of the context where the text begins, -1 if unknown. confidence: its probability, if known.
    f1: 0..1. nbest: text, start and probability of the best entries.
    """

    text: str
    start: int
    f1: float
    confidence: float | None = None
    nbest: Sequence[tuple[str, int, float]] = ()


@dataclass(frozen=True, slots=True)
class QuestionRecord:
    """One row of the table.

    answers: one of each system that is shown. outcome: the key of its class. wrong: comes first where not all fit.
    slices: value by slice name. note: what is to be said of it, shown with its context. file: the file it comes from.
    """

    example_id: str
    question: str
    context: str
    golds: Sequence[Answer]
    answers: Sequence[GivenAnswer]
    outcome: str
    wrong: bool
    slices: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    file: str = ""


class QuestionTable:
    """Collects question records up to a number of bytes and gives them as JSON for the page."""

    def __init__(self, outcomes: Mapping[str, tuple[str, str]], table_bytes: int = TABLE_BYTES):
        """outcomes: name and explanation of each class by its key."""
        self._outcomes = outcomes
        self._limit = table_bytes
        self._heap: list[tuple[bool, int, int, str, int, int]] = []  # wrong, hash, number, JSON, its bytes, context
        self._contexts = _Contexts()
        self._words: dict[str, int] = {}  # file names, slices and values, each once
        self._bytes = 0
        self._full = False
        self.total = 0

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def files(self) -> list[str]:
        """The distinct files of all questions that were added, in their order."""
        return [word[1:] for word in self._words if word.startswith("/")]

    def add(self, record: QuestionRecord) -> None:
        """Add a question; one of less importance is left out where the table is full."""
        self.total += 1
        file = self._word(f"/{record.file}")
        key = (record.wrong, zlib.crc32(record.example_id.encode("utf-8", "surrogatepass")), -self.total)
        if self._full and key < self._heap[0][:3]:
            return
        offset, shown = _excerpt(record)
        context, grown = self._contexts.use(shown)
        row = script_json(self._row(record, file, context, offset, shown))
        size = len(row.encode()) + 1
        heapq.heappush(self._heap, (*key, row, size, context))
        self._bytes += size + grown
        while self._bytes > self._limit and len(self._heap) > 1:
            *_, size, context = heapq.heappop(self._heap)
            self._bytes -= size + self._contexts.release(context)
            self._full = True

    def _row(self, record: QuestionRecord, file: int, context: int, offset: int, shown: str) -> list[Any]:
        def span(text: str, start: int) -> Any:
            """Begin and length in the excerpt, or the text where it is not found there."""
            begin = start - offset
            found = start >= 0 and begin >= 0 and bool(text) and shown[begin : begin + len(text)] == text
            return [begin, len(text)] if found else _cut(text)

        answers = [
            [
                span(answer.text, answer.start),
                None if answer.confidence is None else _rounded(answer.confidence),
                _rounded(answer.f1),
                [[span(text, start), _rounded(probability)] for text, start, probability in answer.nbest],
            ]
            for answer in record.answers
        ]
        golds = list(dict.fromkeys((gold.text, gold.start) for gold in record.golds))
        slices = [self._word(f"{name}={value}") for name, value in record.slices.items()]
        outcome = list(self._outcomes).index(record.outcome)
        marked = [span(text, start) for text, start in golds]
        question = _cut(record.question)
        return [record.example_id, question, context, marked, outcome, answers, slices, file, record.note]

    def _word(self, word: str) -> int:
        return self._words.setdefault(word, len(self._words))

    def data(self, systems: Sequence[str], slice_names: Mapping[str, str]) -> str:
        """All that the page's script shows, as JSON that is safe inside a script element.

        Args:
            systems: names of those whose answers are shown. slice_names: slices in words.
        """
        head = {
            "systems": list(systems),
            "outcomes": [[key, name] for key, (name, _) in self._outcomes.items()],
            "slices": dict(slice_names),
            "words": list(self._words),
            "contexts": self._contexts.texts(),
        }
        rows = ",".join(row for _, _, _, row, _, _ in sorted(self._heap, key=lambda item: -item[2]))
        return f'{script_json(head)[:-1]},"rows":[{rows}]}}'


class _Contexts:
    """Contexts by number, each once and as long as a question uses it; numbers of released ones are used again."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._used: list[tuple[str, int]] = []  # the text and by how many questions it is used
        self._free: list[int] = []

    def use(self, text: str) -> tuple[int, int]:
        """The number of a context, and the bytes that the page grows by."""
        number = self._numbers.get(text)
        if number is not None:
            self._used[number] = (text, self._used[number][1] + 1)
            return number, 0
        if self._free:
            number = self._free.pop()
            self._used[number] = (text, 1)
        else:
            number = len(self._used)
            self._used.append((text, 1))
        self._numbers[text] = number
        return number, _json_bytes(text)

    def release(self, number: int) -> int:
        """The bytes that the page shrinks by when one question less uses the context."""
        text, users = self._used[number]
        if users > 1:
            self._used[number] = (text, users - 1)
            return 0
        del self._numbers[text]
        self._used[number] = ("", 0)
        self._free.append(number)
        return _json_bytes(text)

    def texts(self) -> list[str]:
        """The contexts by number, "" where one is not used."""
        return [text for text, _ in self._used]


def _json_bytes(text: str) -> int:
    return len(script_json(text).encode()) + 1


def _excerpt(record: QuestionRecord) -> tuple[int, str]:
    """The part of the context that is shown, and the number of its first character in the context.

    A cut is shown by "…", which counts as a character of the excerpt.
    """
    context = record.context
    if len(context) <= CONTEXT_CHARACTERS:
        return 0, context
    starts = [gold.start for gold in record.golds] + [answer.start for answer in record.answers]
    first = max(min((start for start in starts if start >= 0), default=0) - CONTEXT_BEFORE, 0)
    last = first + CONTEXT_CHARACTERS
    head, tail = "…" if first else "", "…" if last < len(context) else ""
    return first - len(head), head + context[first:last] + tail


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_CHARACTERS else text[:TEXT_CHARACTERS] + "…"


def _rounded(value: float) -> float | None:
    """None for what JSON cannot hold."""
    return round(value, 4) if math.isfinite(value) else None


def script_json(value: Any) -> str:
    r"""JSON that may stand inside a script element: no markup, no line separators, no halves of surrogate pairs.

    These occur only inside JSON texts, where `\u003c` says the same.
    """
    return _UNSAFE.sub(_escaped, _ENCODER.encode(value))


def _escaped(found: re.Match[str]) -> str:
    character = found.group()
    return "\ufffd" if "\ud800" <= character <= "\udfff" else f"\\u{ord(character):04x}"
