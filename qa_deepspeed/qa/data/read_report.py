"""What became of each question that was read: counts for the log, and a list of the rejected ones for the user."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qa_deepspeed.qa.data.reasons import Fault, Reason, advice
from qa_deepspeed.utils.files import replacing

__all__ = ["Fault", "ReadReport", "Reason", "Rejected", "commonest", "list_counts"]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A question that was left out. `example_id` is None where the file gives none; `detail` may be empty."""

    example_id: str | None
    where: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        """Place, reason, detail and what to do, as one line."""
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.where}: {self.reason}{detail}; {advice(self.reason)}"

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, without an empty detail."""
        return {name: value for name, value in asdict(self).items() if value or name != "detail"}


_KEYS = {"repaired": "mended"}
"""Field -> key on disk where they differ: cache entries keep the key that earlier versions write and read."""

SHOWN_REJECTED = 20

_OPTIONAL = ("ids_made", "notes", "examples_by_file")
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
    examples_by_file: list[int] = field(default_factory=list)
    """Examples taken of each file, where they are counted (`DataSource.by_file`); files that were not reached lack."""

    def reject(self, example_id: str | None, where: str, reason: str, detail: str = "") -> None:
        """Count and list one question that cannot be used."""
        self.rejected_by_reason[reason] = self.rejected_by_reason.get(reason, 0) + 1
        self.rejected.append(Rejected(example_id, where, reason, detail))

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

    def advice(self) -> list[str]:
        """Lines that say what to do about rejected questions, one for each reason, the commonest first."""
        return [f"{reason}: {advice(reason)}" for reason in commonest(self.rejected_by_reason)]

    def left_out(self) -> list[str]:
        """Lines that name the first rejected questions, for standard error."""
        shown = [f"left out: {one}" for one in self.rejected[:SHOWN_REJECTED]]
        more = len(self.rejected) - len(shown)
        return [*shown, f"... and {more:,} more"] if more else shown

    def write_rejected(self, path: Path) -> None:
        """Write the rejected questions as JSON lines with the keys id, where and reason, and perhaps detail."""
        with replacing(path) as partial, open(partial, "w", encoding="utf-8", errors="backslashreplace") as lines:
            for one in self.rejected:
                row = {("id" if name == "example_id" else name): value for name, value in one.to_dict().items()}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, under the keys of `_KEYS`; without those of `_OPTIONAL` that are empty."""
        values = {name: value for name, value in asdict(self).items() if value or name not in _OPTIONAL}
        values["rejected"] = [one.to_dict() for one in self.rejected]
        return {_KEYS.get(name, name): value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReadReport:
        """The report that `to_dict` wrote."""
        fields = {_FIELDS.get(name, name): value for name, value in values.items()}
        return cls(**{**fields, "rejected": [Rejected(**one) for one in fields["rejected"]]})


def commonest(counts: Mapping[str, int]) -> list[str]:
    """The names of some counts, the largest first."""
    return sorted(counts, key=lambda name: (-counts[name], name))


def list_counts(counts: Mapping[str, int]) -> str:
    """`7 this, 5 that`, the commonest first."""
    return ", ".join(f"{counts[name]:,} {name}" for name in commonest(counts))
