"""How a file counts answer_start: code points of Python, or otherwise; decided once for each file.

JavaScript counts UTF-16 units (an emoji is 2), other tools count bytes of UTF-8, count a Windows line end as one
character, or begin at 1. A file is read in the way under which nearly all of its answers stand exactly where they
should. An answer that does not stand there under it stays as the file has it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, chain, islice
from typing import Any

from qa_deepspeed.qa.data.answers import whole_number
from qa_deepspeed.qa.data.validation import Passage

NEARLY_ALL = 0.9
"""Least part of a file's answers that must stand where another way of counting says."""

LEAST_ANSWERS = 3
"""A way of counting must place so many more answers than code points do; fewer are repaired one by one, if at all."""

LOOK_AHEAD_ANSWERS, LOOK_AHEAD_PASSAGES = 1000, 5000
"""How far a file is read, from the first answer that only another way of counting places, before it is decided."""

MOST_LOOK_AHEADS = 20
"""After so many without a decision, answers stay as they are."""

FROM_ONE = "characters from 1"

Place = Callable[[str, int], "int | None"]
"""From a context and a start to its code point; None if there is none."""


def _by_widths(widths: Callable[[str], Iterable[int]]) -> Place:
    """Starts that count units, of which each character of a context has a number."""

    def place(context: str, start: int) -> int | None:
        begins = [0, *accumulate(widths(context))]
        index = bisect_left(begins, start)
        return index if index < len(begins) and begins[index] == start else None

    return place


def _without_line_ends(context: str) -> Iterable[int]:
    """1 for each character, 0 for a carriage return before a line feed."""
    return (not (one == "\r" and following == "\n") for one, following in zip(context, f"{context[1:]} ", strict=False))


WAYS: dict[str, Place] = {
    "UTF-16 units": _by_widths(lambda context: (1 + (one > "\uffff") for one in context)),
    "bytes of UTF-8": _by_widths(lambda context: (len(one.encode("utf-8", "surrogatepass")) for one in context)),
    "Windows line ends as one character": _by_widths(_without_line_ends),
    FROM_ONE: lambda context, start: start - 1 if start > 0 else None,
}
"""Ways of counting beside code points from 0, in the order in which they are preferred."""


def recount(passages: Iterator[Passage], notes: list[str]) -> Iterator[Passage]:
    """The passages, with answer_start in code points; a line about another way of counting goes into `notes`.

    While code points place all answers, or no way does, nothing is to be decided and passages pass through. (What they
    place rightly, another way that may be chosen later places too, but for chance: it is the same place.)
    """
    before = undecided = 0
    for passage in passages:
        answers = list(_answers(passage))
        lost = [one for one in answers if not _stands(*one)]
        if undecided == MOST_LOOK_AHEADS or not any(map(_stands_otherwise, lost)):
            before += len(answers) - len(lost)
            yield passage
            continue
        ahead = [passage, *_look_ahead(passages, len(answers))]
        way, line = _decide(ahead, before)
        if way is None:
            yield from ahead
            undecided += 1
            continue
        notes.append(line)
        yield from (_converted(one, WAYS[way]) for one in chain(ahead, passages))


def _stands(context: str, text: str, index: int | None) -> bool:
    return index is not None and context.startswith(text, index)


def _stands_otherwise(answer: tuple[str, str, int]) -> bool:
    context, text, start = answer
    plain = context.isascii() and "\r" not in context  # then only where counting begins can differ
    ways = [WAYS[FROM_ONE]] if plain else WAYS.values()
    return any(_stands(context, text, way(context, start)) for way in ways)


def _look_ahead(passages: Iterator[Passage], answers: int) -> Iterator[Passage]:
    for passage in islice(passages, LOOK_AHEAD_PASSAGES):
        yield passage
        answers += sum(1 for _ in _answers(passage))
        if answers >= LOOK_AHEAD_ANSWERS:
            return


def _decide(passages: list[Passage], before: int) -> tuple[str | None, str]:
    """The way of counting, None for code points, and the line that says so. before: answers placed by all ways."""
    answers = [answer for passage in passages for answer in _answers(passage)]
    counts = {
        name: sum(_stands(context, text, way(context, start)) for context, text, start in answers)
        for name, way in WAYS.items()
    }
    way = max(counts, key=lambda name: counts[name])  # of equal counts the first
    as_it_is = sum(_stands(*answer) for answer in answers)
    if counts[way] < NEARLY_ALL * len(answers) or counts[way] - as_it_is < LEAST_ANSWERS:
        return None, ""
    matching, total = counts[way] + before, len(answers) + before
    return way, f"answer_start counts {way}: {matching:,} of {total:,} answers match"


def _answers(passage: Passage) -> Iterator[tuple[str, str, int]]:
    """Context, text and start of the answers that can be judged."""
    if not isinstance(passage.context, str):
        return
    for fields in passage.questions:
        for answer in _listed(fields):
            text, start = answer.get("text"), whole_number(answer.get("answer_start"))
            if isinstance(text, str) and text and not text.isspace() and start is not None and start >= 0:
                yield passage.context, text, start


def _listed(fields: Any) -> list[dict[str, Any]]:
    """The answers of a question as dicts, whichever of the two usual layouts they have."""
    answers = fields.get("answers") if isinstance(fields, dict) else None
    if isinstance(answers, dict) and isinstance(answers.get("text"), list):
        starts = answers.get("answer_start")
        if isinstance(starts, list) and len(starts) == len(answers["text"]):
            return [{"text": text, "answer_start": start} for text, start in zip(answers["text"], starts, strict=True)]
    if isinstance(answers, list):
        return [answer for answer in answers if isinstance(answer, dict)]
    return []


def _converted(passage: Passage, place: Place) -> Passage:
    """The passage with starts in code points, of the answers that then stand there."""
    for fields in passage.questions:
        listed = _listed(fields)
        for answer in listed:
            text, start = answer.get("text"), whole_number(answer.get("answer_start"))
            if isinstance(text, str) and start is not None and start >= 0 and isinstance(passage.context, str):
                index = place(passage.context, start)
                if text and _stands(passage.context, text, index):
                    answer["answer_start"] = index
        if listed:
            fields["answers"] = listed
    return passage
