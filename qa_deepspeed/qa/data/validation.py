"""From a row as the file has it to an example that can be used, or the reason why it cannot."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from qa_deepspeed.qa.data.answers import (
    answer_pairs,
    checked_start,
    faultless_answers,
    instead,
    is_missing,
    located_pair,
    says_something,
    where_instead,
)
from qa_deepspeed.qa.data.examples import NO_GOLD, Answer, Example
from qa_deepspeed.qa.data.read_report import ReadReport
from qa_deepspeed.qa.data.reasons import Fault, Reason
from qa_deepspeed.qa.data.seen_ids import SeenIds
from qa_deepspeed.utils.errors import UserError

Purpose = Literal["train", "evaluate"]

_HALF_SURROGATE = re.compile("[\ud800-\udfff]")


class Passage(NamedTuple):
    """A context and its questions as the file has them: nothing about the types of the values is known yet.

    Each question is a dict of id, question, answers and is_impossible, if it is what it should be.
    """

    where: str
    context: Any
    questions: list[Any]
    numbered: bool = True
    """Whether a question's place is its number in the passage; else the passage's place is that of its one question."""
    fault: str = ""
    """Why none of its questions can be used, if its cells are not under the names that the file gives them."""
    detail: str = ""
    """What says more about `fault`."""
    names: tuple[Any, ...] = ()
    """The names that the row or paragraph has, to say which there are where one is missing."""

    def where_is(self, index: int) -> str:
        """The place of a question, as the user can look it up."""
        return f"{self.where}.qas[{index}]" if self.numbered else self.where


class _Version2Marker(Exception):
    """A question says is_impossible in data that are read as SQuAD v1.1."""


def version_2_error(where: str) -> UserError:
    """The error for a SQuAD v2.0 file that is read as v1.1."""
    return UserError(f"{where}: SQuAD v2.0 data with unanswerable questions; pass --version_2_with_negative to read it")


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
        context, context_fault = "", Fault(passage.fault, passage.detail) if passage.fault else None
        try:
            context = self._checked_context(passage)
        except Fault as fault:
            context_fault = context_fault or fault
        for index, fields in enumerate(passage.questions):
            try:
                if not isinstance(fields, dict):
                    raise Fault(Reason.NOT_SQUAD, instead(fields))
                if context_fault:
                    raise context_fault
                yield self._example(context, fields, tuple(fields) if passage.numbered else passage.names)
            except Fault as fault:
                self._report.reject(_id_to_show(fields), passage.where_is(index), fault.reason, fault.detail)
            except _Version2Marker:
                raise version_2_error(passage.where_is(index)) from None

    def _example(self, context: str, fields: dict[str, Any], names: tuple[Any, ...]) -> Example:
        """The question as an example; names: of all that the file has of it."""
        question = _checked_text(fields.get("question"), Reason.NO_QUESTION, names)
        if not question or question.isspace():
            raise Fault(Reason.EMPTY_QUESTION)
        example_id = _checked_id(fields.get("id"))
        made = example_id is None
        if example_id is None:
            example_id = made_id(question, context)
        answers, repaired, faults = self._answers(context, fields, names)
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

    def _checked_context(self, passage: Passage) -> str:
        context = _checked_text(passage.context, Reason.NO_CONTEXT, passage.names)
        if context.isspace():
            context = ""
        if not context and self._training:
            raise Fault(Reason.EMPTY_CONTEXT)
        # Flat rows about one context bring equal strings: they become one object.
        if context == self._last_context:
            return self._last_context
        self._last_context = context
        return context

    def _answers(
        self, context: str, fields: dict[str, Any], names: tuple[Any, ...]
    ) -> tuple[tuple[Answer, ...], bool, list[str]]:
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
        if not impossible and (answers := faultless_answers(context, fields.get("answers"))):
            return answers, False, faults
        none_given = False
        try:
            pairs = answer_pairs(fields.get("answers"))
            none_given = not pairs and says_something(fields.get("answers"))
            if self._training:
                pairs = self._consistent(fields, impossible, pairs, names)
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
                found, place = located_pair(context, text, start)
            except Fault as fault:
                faults.append(fault.reason)
                if not self._training and isinstance(text, str):
                    answers.append(Answer(_HALF_SURROGATE.sub("\ufffd", text), -1))
                continue
            repaired = repaired or place != checked_start(start) or found != text
            # Scores are taken on the text as it was given.
            answers.append(Answer(found, place) if self._training or found == text else Answer(text, -1))
        if self._training and pairs and not answers:
            raise Fault(faults[0], where_instead(context, *pairs[0]))
        return tuple(answers), repaired, faults

    def _consistent(
        self,
        fields: dict[str, Any],
        impossible: bool | None,
        pairs: list[tuple[Any, Any]],
        names: tuple[Any, ...],
    ) -> list[tuple[Any, Any]]:
        """The answers to train on, if there being some or none agrees with everything else that the row says."""
        if impossible:
            # Some data sets give their unanswerable questions one empty answer.
            if any(text != "" for text, _ in pairs):
                raise Fault(Reason.IMPOSSIBLE_WITH_ANSWERS)
            return []
        if fields.get("answers") is None:
            raise Fault(Reason.NO_ANSWER_LIST, instead(None, names))
        if not pairs and not self._version_2:
            raise Fault(Reason.NO_ANSWERS)
        if not pairs and impossible is False:
            raise Fault(Reason.NO_ANSWERS_BUT_POSSIBLE)
        return pairs


def _checked_id(value: Any) -> str | None:
    """The id, None where the row has none."""
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise Fault(Reason.BAD_ID)
    text = _checked_text(value, Reason.BAD_ID)
    return None if text.isspace() else text


def made_id(question: str, context: str) -> str:
    """The id of a question that has none: a digest of question and context, the same in every run."""
    return hashlib.sha256(f"{question}\0{context}".encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _checked_text(value: Any, reason: str, names: tuple[Any, ...] = ()) -> str:
    if not isinstance(value, str):
        raise Fault(reason, instead(value, names))
    if not value.isascii() and _HALF_SURROGATE.search(value):
        raise Fault(Reason.BROKEN_UNICODE)
    return value


def _checked_is_impossible(value: Any) -> bool | None:
    """True, False, or None where the row does not say."""
    if isinstance(value, bool):
        return value
    if is_missing(value):
        return None
    known: dict[Any, bool] = {"true": True, "1": True, "false": False, "0": False, 1: True, 0: False}
    key = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(key, (str, int, float)) or key not in known:
        raise Fault(Reason.BAD_IS_IMPOSSIBLE, instead(value))
    return known[key]


def _id_to_show(fields: Any) -> str | None:
    value = fields.get("id") if isinstance(fields, dict) else None
    if value is None:
        return None
    return _HALF_SURROGATE.sub("\ufffd", str(value))
