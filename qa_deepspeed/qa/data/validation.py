"""From a row as the file has it to an example that can be used, or the reason why it cannot."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from qa_deepspeed.qa.data.examples import NO_GOLD, Answer, Example
from qa_deepspeed.qa.data.read_report import ReadReport, Reason
from qa_deepspeed.qa.data.seen_ids import SeenIds
from qa_deepspeed.qa.data.unicode_forms import find_other_form
from qa_deepspeed.utils.errors import UserError

REPAIR_DISTANCE = 10
"""Most characters between an answer and its answer_start for the answer to be repaired."""

Purpose = Literal["train", "evaluate"]

_HALF_SURROGATE = re.compile("[\ud800-\udfff]")
_WHOLE_NUMBER = re.compile(r"[-+]?\d{1,15}(\.0*)?")


class Passage(NamedTuple):
    """A context and its questions as the file has them: nothing about the types of the values is known yet.

    Each question is a dict of id, question, answers and is_impossible, if it is what it should be.
    """

    where: str
    context: Any
    questions: list[Any]
    numbered: bool = True
    """Whether a question's place is its number in the passage; else the passage's place is that of its one question."""

    def where_is(self, index: int) -> str:
        """The place of a question, as the user can look it up."""
        return f"{self.where}.qas[{index}]" if self.numbered else self.where


class Fault(Exception):
    """A question, or one of its answers, cannot be used, for the reason that is its message."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Version2Marker(Exception):
    """A question says is_impossible in data that are read as SQuAD v1.1."""


def version_2_error(where: str) -> UserError:
    """The error for a SQuAD v2.0 file that is read as v1.1."""
    return UserError(f"{where}: SQuAD v2.0 data with unanswerable questions; pass --version_2_with_negative to read it")


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


class Validator:
    """Validates passages one after another and keeps the report and the ids: one validator sees all files."""

    def __init__(self, purpose: Purpose, version_2_with_negative: bool, report: ReadReport) -> None:
        self._training = purpose == "train"
        self._version_2 = version_2_with_negative
        self._report = report
        self._seen = SeenIds()
        self._last_context = ""

    def examples(self, passage: Passage) -> Iterator[Example]:
        """The questions of a passage that can be used; the others go into the report.

        Raises:
            UserError: a question says is_impossible, but the data are read as SQuAD v1.1.
        """
        context, context_fault = "", ""
        try:
            context = self._checked_context(passage.context)
        except Fault as fault:
            context_fault = fault.reason
        for index, fields in enumerate(passage.questions):
            try:
                if not isinstance(fields, dict):
                    raise Fault(Reason.NOT_SQUAD)
                if context_fault:
                    raise Fault(context_fault)
                yield self._example(context, fields)
            except Fault as fault:
                self._report.reject(_id_to_show(fields), passage.where_is(index), fault.reason)
            except _Version2Marker:
                raise version_2_error(passage.where_is(index)) from None

    def _example(self, context: str, fields: dict[str, Any]) -> Example:
        question = _checked_text(fields.get("question"), Reason.NO_QUESTION)
        if not question or question.isspace():
            raise Fault(Reason.EMPTY_QUESTION)
        example_id = _checked_id(fields.get("id"))
        made = example_id is None
        if example_id is None:
            example_id = made_id(question, context)
        answers, repaired, faults = self._answers(context, fields)
        if not self._seen.add(example_id):
            raise Fault(Reason.DUPLICATE_ID)
        report = self._report
        report.usable += 1
        report.repaired += repaired
        report.ids_made += made
        report.unanswerable += not answers
        for reason in faults:
            report.count_answer_fault(reason)
        return Example(example_id, question, context, answers)

    def _checked_context(self, raw: Any) -> str:
        context = _checked_text(raw, Reason.NO_CONTEXT)
        if context.isspace():
            context = ""
        if not context and self._training:
            raise Fault(Reason.EMPTY_CONTEXT)
        # Flat rows about one context bring equal strings: they become one object.
        if context == self._last_context:
            return self._last_context
        self._last_context = context
        return context

    def _answers(self, context: str, fields: dict[str, Any]) -> tuple[tuple[Answer, ...], bool, list[str]]:
        """The answers to use, whether one was repaired, and the faults of answers that do not reject the question.

        Only an empty list of answers or is_impossible makes a question unanswerable. One without answers, or with none
        that can be read, has `NO_GOLD` in an evaluation.
        """
        faults: list[str] = []
        impossible = None
        pairs: list[tuple[Any, Any]] = []
        try:
            impossible = _checked_is_impossible(fields.get("is_impossible"))
        except Fault as fault:
            self._note(fault, faults)
        if impossible and not self._version_2:
            raise _Version2Marker
        if not impossible and (answers := _faultless_answers(context, fields.get("answers"))):
            return answers, False, faults
        none_given = False
        try:
            pairs = answer_pairs(fields.get("answers"))
            none_given = not pairs and _is_given(fields.get("answers"))
            if self._training:
                pairs = self._consistent(fields, impossible, pairs)
        except Fault as fault:
            self._note(fault, faults)
        answers, repaired, faults = self._located_answers(context, pairs, faults)
        unanswerable = impossible or (self._version_2 and impossible is None and none_given)
        if not (answers or unanswerable or self._training):
            answers = NO_GOLD
        return answers, repaired, faults

    def _note(self, fault: Fault, faults: list[str]) -> None:
        """Faults of the answers reject a question for training only."""
        if self._training:
            raise fault
        faults.append(fault.reason)

    def _located_answers(
        self, context: str, pairs: list[tuple[Any, Any]], faults: list[str]
    ) -> tuple[tuple[Answer, ...], bool, list[str]]:
        answers: list[Answer] = []
        repaired = False
        for text, start in pairs:
            try:
                found, place = _located_pair(context, text, start)
            except Fault as fault:
                faults.append(fault.reason)
                if not self._training and isinstance(text, str):
                    answers.append(Answer(_HALF_SURROGATE.sub("\ufffd", text), -1))
                continue
            repaired = repaired or place != _checked_start(start) or found != text
            # Scores are taken on the text as it was given.
            answers.append(Answer(found, place) if self._training or found == text else Answer(text, -1))
        if self._training and pairs and not answers:
            raise Fault(faults[0])
        return tuple(answers), repaired, faults

    def _consistent(
        self, fields: dict[str, Any], impossible: bool | None, pairs: list[tuple[Any, Any]]
    ) -> list[tuple[Any, Any]]:
        """The answers to train on, if there being some or none agrees with everything else that the row says."""
        if impossible:
            # Some data sets give their unanswerable questions one empty answer.
            if any(text != "" for text, _ in pairs):
                raise Fault(Reason.IMPOSSIBLE_WITH_ANSWERS)
            return []
        if fields.get("answers") is None:
            raise Fault(Reason.NO_ANSWER_LIST)
        if not pairs and not self._version_2:
            raise Fault(Reason.NO_ANSWERS)
        if not pairs and impossible is False:
            raise Fault(Reason.NO_ANSWERS_BUT_POSSIBLE)
        return pairs


def _faultless_answers(context: str, answers: Any) -> tuple[Answer, ...]:
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
            raise Fault(Reason.BAD_ANSWER_LIST)
        return list(zip(texts, starts, strict=True))
    if isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers):
        return [(answer.get("text"), answer.get("answer_start")) for answer in answers]
    raise Fault(Reason.BAD_ANSWER_LIST)


def _is_given(answers: Any) -> bool:
    """Whether the row says anything of its answers; a blank cell of a CSV file does not."""
    return answers is not None and not (isinstance(answers, str) and answers.strip() in ("", "null", "None"))


def _parsed_answers(cell: str) -> Any:
    """The answers in a cell of a CSV file: JSON, a Python literal as pandas writes it, or one with numpy's arrays."""
    if not cell or cell.isspace():
        return []
    for parse in (json.loads, ast.literal_eval, _numpy_literal):
        try:
            return parse(cell)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    raise Fault(Reason.BAD_ANSWER_LIST)


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


def _located_pair(context: str, text: Any, start: Any) -> tuple[str, int]:
    if not isinstance(text, str):
        raise Fault(Reason.BAD_ANSWER_TEXT)
    return locate(context, text, _checked_start(start))


def _checked_start(start: Any) -> int:
    """The start as a number, -1 where the row does not say.

    Tables hold whole numbers as text, or, where a column has gaps, as floats.
    """
    if start is None:
        return -1
    if isinstance(start, str) and _WHOLE_NUMBER.fullmatch(start.strip()):
        return int(float(start))
    if isinstance(start, float) and start.is_integer():
        return int(start)
    if type(start) is not int:
        raise Fault(Reason.BAD_START)
    return start


def _checked_id(value: Any) -> str | None:
    """The id, None where the row has none."""
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = _checked_text(value, Reason.BAD_ID)
    return None if text.isspace() else text


def made_id(question: str, context: str) -> str:
    """The id of a question that has none: a digest of question and context, the same in every run."""
    return hashlib.sha256(f"{question}\0{context}".encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _checked_text(value: Any, reason: str) -> str:
    if not isinstance(value, str):
        raise Fault(reason)
    if not value.isascii() and _HALF_SURROGATE.search(value):
        raise Fault(Reason.BROKEN_UNICODE)
    return value


def _checked_is_impossible(value: Any) -> bool | None:
    """True, False, or None where the row does not say."""
    if value is None or isinstance(value, bool):
        return value
    known: dict[Any, bool | None] = {"": None, "true": True, "1": True, "false": False, "0": False, 1: True, 0: False}
    key = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(key, (str, int, float)) or key not in known:
        raise Fault(Reason.BAD_IS_IMPOSSIBLE)
    return known[key]


def _id_to_show(fields: Any) -> str | None:
    value = fields.get("id") if isinstance(fields, dict) else None
    if value is None:
        return None
    return _HALF_SURROGATE.sub("\ufffd", str(value))
