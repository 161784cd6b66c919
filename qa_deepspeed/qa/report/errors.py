"""Why an answer is wrong: the classes of errors, and the F1 that each of them costs.

Classes go by places in the context, not by words: the same words elsewhere in the text are another answer.
"""

from __future__ import annotations

from typing import Any

from qa_deepspeed.qa.data.examples import Answer, Example

RIGHT = "right"
BOUNDARY = "boundary"
WRONG_PLACE = "wrong_place"
MISSED = "missed"
SHOULD_BE_EMPTY = "should_be_empty"
GOLD_DOUBTFUL = "gold_doubtful"

CLASSES: dict[str, tuple[str, str]] = {
    BOUNDARY: ("Boundary", "right place, other words: the answer overlaps a gold answer"),
    WRONG_PLACE: ("Wrong place", "the answer stands elsewhere in the text"),
    MISSED: ("Missed", "left empty, although the text holds an answer"),
    SHOULD_BE_EMPTY: ("Should be empty", "answered, although the text holds no answer"),
    GOLD_DOUBTFUL: ("Gold doubtful", "not right, but the gold answers themselves look wrong"),
    RIGHT: ("Right", "equal to a gold answer, up to case, punctuation and articles"),
}
"""Name and explanation of each class, by its key in report.json."""


def error_class(example: Example, text: str, start: int, exact: int, f1: float) -> str:
    """The class of one answer.

    Args:
        start: the character of the context where `text` begins, -1 where that is not known.
        exact, f1: the answer's scores, 0..1.
    """
    if exact:
        return RIGHT
    if gold_doubt(example):
        return GOLD_DOUBTFUL
    if not text:
        return MISSED
    if not example.answers:
        return SHOULD_BE_EMPTY
    places = _places(example.answers)
    if start < 0 or not places:
        return BOUNDARY if f1 > 0 else WRONG_PLACE
    answer = (start, start + len(text))
    return BOUNDARY if any(_overlap(answer, place) for place in places) else WRONG_PLACE


def gold_doubt(example: Example) -> str:
    """What is wrong with the gold answers themselves, in words; "" where nothing is seen.

    One sound gold answer among several is enough for "".
    """
    if not example.answers:
        return ""
    places = _places(example.answers)
    if not places:
        return "no gold answer stands in the text where it should"
    if all(_cuts_a_word(example.context, *place) for place in places):
        return "the gold answer begins or ends inside a word"
    texts = [answer.text.casefold() for answer in example.answers if answer.start >= 0 and answer.text]
    pairs = [(i, j) for i in range(len(places)) for j in range(i)]
    if pairs and not any(_overlap(places[i], places[j]) or texts[i] == texts[j] for i, j in pairs):
        return "the annotators marked different places"
    return ""


def _places(answers: tuple[Answer, ...]) -> list[tuple[int, int]]:
    """Begin and end in the context of the answers whose place is known."""
    return [(answer.start, answer.start + len(answer.text)) for answer in answers if answer.start >= 0 and answer.text]


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _cuts_a_word(context: str, begin: int, end: int) -> bool:
    """Whether the place begins or ends between two letters, or two digits, of one word.

    Only letters with case count: scripts without it (Chinese, Thai, ...) mostly write words without blanks.
    """
    return any(_joined(context[cut - 1], context[cut]) for cut in (begin, end) if 0 < cut < len(context))


def _joined(left: str, right: str) -> bool:
    return all(c.isdigit() for c in (left, right)) or all(c.lower() != c.upper() for c in (left, right))


class ErrorCounts:
    """Counts the questions of each class, and the F1 that is lost in them."""

    def __init__(self) -> None:
        self._questions = dict.fromkeys(CLASSES, 0)
        self._lost = dict.fromkeys(CLASSES, 0.0)

    def add(self, error: str, f1: float) -> None:
        """Count one question of class `error`, with its F1 in 0..1."""
        self._questions[error] += 1
        self._lost[error] += 1.0 - f1

    def report(self) -> dict[str, dict[str, Any]]:
        """By class: `questions`, `lost_f1` (percent points of the F1 of all questions) and `part_of_lost_f1` (0..1).

        The lost points of all classes add up to 100 minus F1.
        """
        total, lost = sum(self._questions.values()), sum(self._lost.values())
        return {
            name: {
                "questions": self._questions[name],
                "lost_f1": 100 * self._lost[name] / total if total else 0.0,
                "part_of_lost_f1": self._lost[name] / lost if lost else 0.0,
            }
            for name in CLASSES
        }
