"""What became of each question that was read: counts for the log, and a list of the rejected ones for the user."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qa_deepspeed.utils.files import replacing


class Reason:
    """Why a question, or one answer of it, cannot be used."""

    NOT_SQUAD = "not an object of the SQuAD layout"
    BAD_ID = "id neither text nor a whole number"
    DUPLICATE_ID = "duplicate id"
    TOO_MANY_CELLS = "more cells than the header has columns"
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


class Fault(Exception):
    """A question, or one of its answers, cannot be used, for the reason that is its message."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Rejected:
    """A question that was left out. `example_id` is None where the file gives none."""

    example_id: str | None
    where: str
    reason: str


_KEYS = {"repaired": "mended"}
"""Field -> key on disk where they differ: cache entries keep the key that earlier versions write and read."""

SHOWN_REJECTED = 20

_OPTIONAL = ("ids_made", "notes")
"""Fields that reports of earlier versions lack."""

_FIELDS = {key: name for name, key in _KEYS.items()}


@dataclass
class ReadReport:
    """Counts of questions by outcome; complete once all examples have been read.

    `repaired` and `unanswerable` questions are among the `usable` ones. `answer_faults` counts faulty answers of usable
    questions: training uses another answer, and evaluation scores on the text.
    """

    usable: int = 0
    repaired: int = 0
    unanswerable: int = 0
    rejected_by_reason: dict[str, int] = field(default_factory=dict)
    answer_faults: dict[str, int] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    ids_made: int = 0
    """Questions without an id, which got one (`validation.made_id`)."""
    notes: list[str] = field(default_factory=list)
    """Lines on how files were read that cannot be taken literally (`offsets.recount`)."""

    def reject(self, example_id: str | None, where: str, reason: str) -> None:
        """Count and list one question that cannot be used."""
        self.rejected_by_reason[reason] = self.rejected_by_reason.get(reason, 0) + 1
        self.rejected.append(Rejected(example_id, where, reason))

    def count_answer_fault(self, reason: str) -> None:
        """Count one faulty answer of a usable question."""
        self.answer_faults[reason] = self.answer_faults.get(reason, 0) + 1

    def summary(self) -> str:
        """One line for the log, the commonest reasons first."""
        repaired = f" ({self.repaired:,} repaired)" if self.repaired else ""
        text = f"{self.usable:,} usable{repaired}, {len(self.rejected):,} rejected"
        if self.rejected_by_reason:
            text += f" ({list_counts(self.rejected_by_reason)})"
        if self.answer_faults:
            text += f"; faulty answers of usable questions: {list_counts(self.answer_faults)}"
        if self.ids_made:
            text += f"; {self.ids_made:,} without an id got one"
        return "; ".join([text, *self.notes])

    def left_out(self) -> list[str]:
        """Lines that name the first rejected questions, for standard error."""
        shown = [f"left out: {one.where}: {one.reason}" for one in self.rejected[:SHOWN_REJECTED]]
        more = len(self.rejected) - len(shown)
        return [*shown, f"... and {more:,} more"] if more else shown

    def write_rejected(self, path: Path) -> None:
        """Write the rejected questions as JSON lines with the keys id, where and reason."""
        with replacing(path) as partial, open(partial, "w", encoding="utf-8", errors="backslashreplace") as lines:
            for one in self.rejected:
                row = {"id": one.example_id, "where": one.where, "reason": one.reason}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, under the keys of `_KEYS`; without those of `_OPTIONAL` that are empty."""
        values = {name: value for name, value in asdict(self).items() if value or name not in _OPTIONAL}
        return {_KEYS.get(name, name): value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReadReport:
        """The report that `to_dict` wrote."""
        fields = {_FIELDS.get(name, name): value for name, value in values.items()}
        return cls(**{**fields, "rejected": [Rejected(**one) for one in fields["rejected"]]})


def list_counts(counts: Mapping[str, int]) -> str:
    """`7 this, 5 that`, the commonest first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {reason}" for reason, count in ordered)
