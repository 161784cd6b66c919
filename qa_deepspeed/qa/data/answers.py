"""The answers of a row: from any layout to texts at their places in the context, repaired where that is safe."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from bisect import bisect_left
from typing import Any

from qa_deepspeed.qa.data.examples import Answer
from qa_deepspeed.qa.data.reasons import Fault, Reason
from qa_deepspeed.qa.data.unicode_forms import find_other_form

REPAIR_DISTANCE = 10
"""Most characters between an answer and its answer_start for the answer to be repaired."""

_WHOLE_NUMBER = re.compile(r"[-+]?\d{1,15}(\.0*)?")


def matches_at(context: str, text: str, start: int) -> bool:
    """Whether a text that is not blank stands at a place of the context."""
    return start >= 0 and text != "" and context.startswith(text, start) and not text.isspace()


def locate(context: str, text: str, start: int) -> tuple[str, int]:
    """The answer's text and first character in the context, repaired where that is safe.

    What is safe: the text without the blanks around it stands at answer_start (where it would stand with or without
    its leading blanks); or it stands, counting overlaps, exactly once among the places at most `REPAIR_DISTANCE`
    characters from there, and not as a part of a longer word or number. So a repaired answer is right whenever its true
    place is that near. A negative answer_start means "unknown": then the text must stand once in the whole context. A
    text in another Unicode form than the context's is found through a map of positions, and becomes a slice of it.

    Raises:
        Fault: the answer is not there and cannot be repaired.
    """
    if matches_at(context, text, start):
        return text, start
    stripped = text.strip()
    if not stripped:
        raise Fault(Reason.EMPTY_ANSWER)
    if start < 0:
        everywhere = _places(context, stripped, 0, len(context))
        if len(everywhere) == 1 and not _cuts_a_word(context, everywhere[0], everywhere[0] + len(stripped)):
            return stripped, everywhere[0]
        raise Fault(Reason.START_UNKNOWN)
    leading_blanks = len(text) - len(text.lstrip())
    claimed = {place for place in (start, start + leading_blanks) if context.startswith(stripped, place)}
    if len(claimed) == 1:
        return stripped, claimed.pop()
    nearby = _places(context, stripped, max(0, start - REPAIR_DISTANCE), start + leading_blanks + REPAIR_DISTANCE)
    if len(nearby) == 1 and not _cuts_a_word(context, nearby[0], nearby[0] + len(stripped)):
        return stripped, nearby[0]
    if stripped not in context and (found := find_other_form(context, stripped, start, REPAIR_DISTANCE)) is not None:
        begin, end = found
        return context[begin:end], begin
    if start >= len(context):
        raise Fault(Reason.START_PAST_END)
    if stripped not in context:
        raise Fault(Reason.TEXT_ABSENT)
    raise Fault(Reason.AMBIGUOUS if len(nearby) > 1 else Reason.NOT_AT_START)


SHOWN = 40
"""Characters of a value that a message shows."""

_ALIKE = {
    **dict.fromkeys(map(ord, "‘’‚‛′"), "'"),
    **dict.fromkeys(map(ord, "“”„‟″«»"), '"'),
    **dict.fromkeys(map(ord, "–—‑−"), "-"),
    **dict.fromkeys(map(ord, "\u00a0\u202f\u2009"), " "),
}
"""Characters that programs put for each other."""


def instead(value: Any, names: tuple[Any, ...] = ()) -> str:
    """For a message: the value that stands there, or the names that there are where it is missing."""
    if value is None and names:
        return f"there are {', '.join(str(name) for name in names if name is not None)}"
    text = repr(value)
    return f"it is {text if len(text) <= SHOWN else f'{text[: SHOWN - 3]}...'}"


def where_instead(context: str, text: Any, start: Any) -> str:
    """For a message: an answer that was not found, and where it, or what is most like it, stands in the context."""
    if not isinstance(text, str) or not text.strip():
        return instead(text)
    text = text.strip()
    shown = repr(text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...")
    number = whole_number(start)
    if number is None and not is_missing(start):
        return f"{shown}: answer_start is {instead(start).removeprefix('it is ')}"
    places = _places(context, text, 0, len(context))
    if places:
        near = min(places, key=lambda place: abs(place - (number or 0)))
        given = "" if number is None or number < 0 else f"answer_start is {number}, "
        others = f", the nearest of {len(places)} places" if len(places) > 1 else ""
        return f"{shown}: {given}it stands at {near}{others}"
    return f"{shown}: {_most_alike(context, text)}"


def _most_alike(context: str, text: str) -> str:
    """The place that differs from a text only in case, blanks or marks, else that of its longest beginning."""
    flat_context, flat_text = (one.translate(_ALIKE).lower() for one in (context, text))
    if len(flat_context) == len(context):
        pattern = r"\s+".join(map(re.escape, flat_text.split()))
        if found := re.search(pattern, flat_context):
            there = context[found.start() : found.end()]
            if there.lower() == text.lower():
                return f"differs in case at {found.start()}"
            in_blanks = "".join(there.split()) == "".join(text.split())
            return f"differs in {'blanks' if in_blanks else 'quotation marks, dashes or blanks'} at {found.start()}"
    length = bisect_left(range(1, len(text) + 1), True, key=lambda size: text[:size] not in context)
    beginning = text[:length].rstrip()
    if length < LEAST_BEGINNING:
        return "nothing like it is there"
    return f"its beginning {beginning!r} is there at {context.index(beginning)}"


LEAST_BEGINNING = 4
"""Characters of a text that say something about its place."""


def _places(context: str, text: str, first: int, last: int) -> list[int]:
    places = []
    place = context.find(text, first, last + len(text))
    while place >= 0:
        places.append(place)
        place = context.find(text, place + 1, last + len(text))
    return places


def _cuts_a_word(context: str, begin: int, end: int) -> bool:
    return any(0 < cut < len(context) and _joins(context[cut - 1]) and _joins(context[cut]) for cut in (begin, end))


def _joins(character: str) -> bool:
    # Scripts with upper and lower case part their words by blanks; Chinese, Japanese or Thai do not.
    return character.isdecimal() or character.lower() != character.upper()


def faultless_answers(context: str, answers: Any) -> tuple[Answer, ...]:
    """All answers of a list of dicts or a dict of lists, if there are some and each stands where it says; else none.

    Nearly all questions are such, and this is several times as fast as judging each answer.
    """
    located = []
    try:
        if type(answers) is list:
            pairs = [(answer["text"], answer["answer_start"]) for answer in answers]
        elif type(answers) is dict and type(answers["text"]) is list:
            pairs = list(zip(answers["text"], answers["answer_start"], strict=True))
        else:
            return ()
    except (KeyError, TypeError, ValueError):
        return ()
    for text, start in pairs:
        if not (type(start) is int and type(text) is str and matches_at(context, text, start)):
            return ()
        located.append(Answer(text, start))
    return tuple(located)


def answer_pairs(answers: Any) -> list[tuple[Any, Any]]:
    """(text, answer_start) of each answer, unchecked: from a list of dicts, a dict of lists, or either as a string.

    Raises:
        Fault: the answers are laid out in another way.
    """
    if isinstance(answers, str):
        answers = _parsed_answers(answers)
    if answers is None:
        return []
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if not isinstance(texts, list):
            texts, starts = [texts], [starts]
        if not isinstance(starts, list) or len(starts) != len(texts):
            raise Fault(Reason.BAD_ANSWER_LIST, instead(answers))
        return list(zip(texts, starts, strict=True))
    if isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers):
        return [(answer.get("text"), answer.get("answer_start")) for answer in answers]
    raise Fault(Reason.BAD_ANSWER_LIST, instead(answers))


def says_something(answers: Any) -> bool:
    """Whether the row says anything of its answers; a blank cell of a CSV file does not."""
    return answers is not None and not (isinstance(answers, str) and answers.strip() in ("", "null", "None"))


def answers_in_cell(cell: Any) -> Any:
    """The list or object that a cell of a table holds as text; any other cell as it is."""
    if isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(Fault):
            return _parsed_answers(cell)
    return cell


def _parsed_answers(cell: str) -> Any:
    """The answers in a cell of a CSV file: JSON, a Python literal as pandas writes it, or one with numpy's arrays."""
    if not cell or cell.isspace():
        return []
    for parse in (json.loads, ast.literal_eval, _numpy_literal):
        try:
            return parse(cell)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    raise Fault(Reason.BAD_ANSWER_LIST, instead(cell))


def _numpy_literal(cell: str) -> Any:
    """A Python literal in which `array([...], dtype=...)` stands for a list, as `Dataset.to_csv` writes it."""
    tree = _ArraysAsLists().visit(ast.parse(cell.strip(), mode="eval"))
    return ast.literal_eval(tree)


class _ArraysAsLists(ast.NodeTransformer):
    """Replaces calls of `array` by their first argument; nothing is ever called."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name != "array" or not node.args:
            raise ValueError(f"a call of {name or 'something'}")
        return self.visit(node.args[0])  # type: ignore[no-any-return]


def located_pair(context: str, text: Any, start: Any) -> tuple[str, int]:
    if not isinstance(text, str):
        raise Fault(Reason.BAD_ANSWER_TEXT)
    return locate(context, text, checked_start(start))


def checked_start(start: Any) -> int:
    """The start as a number, -1 where the row does not say."""
    if is_missing(start):
        return -1
    number = whole_number(start)
    if number is None:
        raise Fault(Reason.BAD_START)
    return number


def whole_number(value: Any) -> int | None:
    """A number as `int`, None for what is none: tables hold them as text, or as floats where a column has gaps."""
    if type(value) is int:
        return value
    if isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value.strip()):
        return int(float(value))
    return int(value) if isinstance(value, float) and value.is_integer() else None


def is_missing(value: Any) -> bool:
    """Whether a row does not say: null, a blank cell, or pandas' NaN."""
    return value is None or (isinstance(value, str) and not value.strip()) or value != value
