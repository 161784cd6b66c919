"""Why a question, or one of its answers, cannot be used, and for each reason what to do."""

from __future__ import annotations

LAYOUTS = (
    "SQuAD JSON; rows with question, context and answers; exports of MRQA, KorQuAD 2, DPR, Label Studio and doccano"
)
"""The layouts that are read, for messages."""


class Reason:
    """Why a question, or one answer of it, cannot be used."""

    NOT_SQUAD = "not an object of the SQuAD layout"
    BAD_ID = "id neither text nor a whole number"
    DUPLICATE_ID = "duplicate id"
    TOO_MANY_CELLS = "more cells than the header has columns"
    SWALLOWED_ROWS = "a cell that holds the rows after it"
    NO_QUESTION = "question missing or not text"
    EMPTY_QUESTION = "empty question"
    NO_CONTEXT = "context missing or not text"
    EMPTY_CONTEXT = "empty context"
    BROKEN_UNICODE = "half a surrogate pair in the text"
    NO_ANSWER_LIST = "answers missing"
    BAD_ANSWER_LIST = "answers not in a known layout"
    NO_ANSWERS = "no answers (unanswerable questions need --version_2_with_negative)"
    NO_ANSWERS_BUT_POSSIBLE = "no answers although is_impossible is false"
    IMPOSSIBLE_WITH_ANSWERS = "is_impossible with answers"
    BAD_IS_IMPOSSIBLE = "is_impossible neither true nor false"
    BAD_ANSWER_TEXT = "answer text missing or not text"
    EMPTY_ANSWER = "empty answer text"
    BAD_START = "answer_start not a whole number"
    START_UNKNOWN = "answer_start missing or negative, and the text not exactly once in the context"
    START_PAST_END = "answer_start past the end of the context"
    TEXT_ABSENT = "answer text not in the context"
    AMBIGUOUS = "answer not at answer_start and more than once nearby"
    NOT_AT_START = "answer not at answer_start"


_CORRECT_START = (
    "correct answer_start, the number of characters before the answer, or remove it where the text stands once"
)

_ADVICE = {
    Reason.NOT_SQUAD: f"write it in a known layout: {LAYOUTS}",
    Reason.BAD_ID: "write a text or a whole number, or remove it: an id is made then",
    Reason.DUPLICATE_ID: "change one of them, or remove all ids: they are made then; --id_column names another column",
    Reason.TOO_MANY_CELLS: "put quotation marks around cells that hold the delimiter, and double those inside of them",
    Reason.SWALLOWED_ROWS: "remove or double the quotation mark that begins the cell",
    Reason.NO_QUESTION: "write one, or name its column with --question_column",
    Reason.EMPTY_QUESTION: "write one, or remove the row",
    Reason.NO_CONTEXT: "write one, or name its column with --context_column",
    Reason.EMPTY_CONTEXT: "write one, or remove the row",
    Reason.BROKEN_UNICODE: "write the character again: its escape lacks the other half (\\ud83d\\ude00 is one emoji)",
    Reason.NO_ANSWER_LIST: (
        "name their column with --answers_column or --answer_text_column; an empty list says that there is no answer"
    ),
    Reason.BAD_ANSWER_LIST: 'write {"text": [...], "answer_start": [...]} or [{"text": ..., "answer_start": ...}]',
    Reason.NO_ANSWERS: "pass --version_2_with_negative, or write an answer",
    Reason.NO_ANSWERS_BUT_POSSIBLE: "write an answer, or is_impossible true",
    Reason.IMPOSSIBLE_WITH_ANSWERS: "remove the answers, or write is_impossible false",
    Reason.BAD_IS_IMPOSSIBLE: "write true or false, or name another column with --is_impossible_column",
    Reason.BAD_ANSWER_TEXT: "write it as text, or name its column with --answer_text_column",
    Reason.EMPTY_ANSWER: "write the answer, or an empty list of answers where there is none",
    Reason.BAD_START: "write the number of characters before the answer, or name its column with --answer_start_column",
    Reason.START_UNKNOWN: "write answer_start, the number of characters before the answer",
    Reason.START_PAST_END: _CORRECT_START,
    Reason.TEXT_ABSENT: "copy the answer from the context, or remove it",
    Reason.AMBIGUOUS: _CORRECT_START,
    Reason.NOT_AT_START: _CORRECT_START,
}


def advice(reason: str) -> str:
    """What to do about questions that were rejected for this reason, which an earlier version may have named."""
    return _ADVICE.get(reason, "correct it, or remove the question")


class Fault(Exception):
    """A question, or one of its answers, cannot be used, for a reason of `Reason`.

    `detail` says what stands there instead, or where the answer would be found.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
