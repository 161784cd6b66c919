"""From files to validated examples: the only entry point for questions."""

from __future__ import annotations

import glob
import hashlib
import os
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.data.formats import ColumnNames, read_passages
from qa_deepspeed.qa.data.offsets import recount
from qa_deepspeed.qa.data.read_report import ReadReport, Rejected, list_counts
from qa_deepspeed.qa.data.reasons import LAYOUTS
from qa_deepspeed.qa.data.seen_ids import SeenIds
from qa_deepspeed.qa.data.validation import Passage, Purpose, Validator
from qa_deepspeed.utils.errors import UserError

__all__ = ["ColumnNames", "DataSource", "ReadReport", "Rejected", "read_examples", "resolve_files"]


@dataclass(frozen=True)
class DataSource:
    """What is read, and how.

    `max_examples` for training: the usable questions in file order, shuffled by `random.Random(seed)`, the first N.
    For evaluation: the first N that can be evaluated; the seed plays no part.
    `validation`: ratio and seed of the contexts that are held out of the files for evaluation; training takes the
    others, so that no context is on both sides. None: both take all.
    `by_file`: the files are data sets of their own: the report counts the examples of each, and an id that an earlier
    file has too gets the number of its file in front (`2/ID`); otherwise the later question is rejected.
    """

    files: tuple[str, ...]
    purpose: Purpose
    version_2_with_negative: bool
    max_examples: int | None = None
    seed: int = 42
    columns: ColumnNames = ColumnNames()
    encoding: str | None = None
    validation: tuple[float, int] | None = None
    by_file: bool = False

    def __post_init__(self) -> None:
        if self.max_examples is not None and self.max_examples < 1:
            raise UserError(
                f"max_train_examples and max_eval_examples must be at least 1, not {self.max_examples}: raise it"
            )

    @staticmethod
    def resolve(patterns: str | Iterable[str]) -> tuple[str, ...]:
        """The files that paths and glob patterns name: see `resolve_files`."""
        return resolve_files([patterns] if isinstance(patterns, str) else patterns)


def resolve_files(patterns: Iterable[str]) -> tuple[str, ...]:
    """Files in the order of the patterns, those of one pattern sorted by name, each file once.

    Raises:
        UserError: a path does not exist, or a pattern matches nothing.
    """
    files: dict[str, None] = {}
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        if os.path.exists(path):
            files[path] = None
            continue
        matches = [match for match in sorted(glob.glob(path, recursive=True)) if os.path.isfile(match)]
        if not matches:
            raise UserError(f"{pattern}: no such file; check the path, or the pattern if it is one")
        files.update(dict.fromkeys(matches))
    return tuple(files)


def read_examples(source: DataSource, report: ReadReport) -> Iterator[Example]:
    """The examples of a source in file order; the report is complete when they have been read to the end.

    For training: questions that are whole, with answers at their places in the context. For evaluation: every
    question with an id, a question and a context, with all its gold texts; a blank context is yielded as "".
    Consecutive questions about one context share its `str` object. With `max_examples`, a training file is read
    twice (counted, then taken from) and the report covers all of it; reading for evaluation stops after the N-th.

    Raises:
        UserError: a file cannot be read, is SQuAD v2.0 without `version_2_with_negative`, or has nothing usable.
    """
    if source.max_examples is None:
        yield from _counted(_usable(source, report), report)
    elif source.purpose == "evaluate":
        yield from _counted(_first(source, report, source.max_examples), report)
    else:
        count = sum(1 for _ in _usable(source, report))
        chosen = _chosen(count, source.max_examples, source.seed)
        again = ReadReport()
        usable = enumerate(_usable(replace(source, max_examples=None), again))
        yield from _counted((example for index, example in usable if chosen[index]), again)
        report.examples_by_file = again.examples_by_file


def _counted(examples: Iterator[Example], report: ReadReport) -> Iterator[Example]:
    """Count the examples of each file, where `_usable` has begun to."""
    for example in examples:
        if report.examples_by_file:
            report.examples_by_file[-1] += 1
        yield example


def _first(source: DataSource, report: ReadReport, limit: int) -> Iterator[Example]:
    for number, example in enumerate(_usable(source, report), start=1):
        yield example
        if number == limit:
            return


def _chosen(count: int, limit: int, seed: int) -> bytearray:
    """One byte for each of `count` questions: 1 if it is among the first `limit` of the shuffled list."""
    # An array of machine integers is shuffled as a list is, in a quarter of the memory.
    order = array("q", range(count))
    random.Random(seed).shuffle(order)
    chosen = bytearray(count)
    for index in order[:limit]:
        chosen[index] = 1
    return chosen


def _is_taken(source: DataSource, passage: Passage) -> bool:
    """Whether a passage belongs to the part of the file that the source reads."""
    if source.validation is None:
        return True
    ratio, seed = source.validation
    digest = hashlib.sha256(f"{seed}\0{passage.context}".encode("utf-8", "surrogatepass")).digest()
    held_out = int.from_bytes(digest[:8], "big") < ratio * 2**64
    return held_out == (source.purpose == "evaluate")


class _IdsOfFiles:
    """Makes the ids of several files distinct. `number`: of the current file, from 1; `renamed`: of its ids."""

    def __init__(self) -> None:
        self._seen = SeenIds()
        self.number = self.renamed = 0

    def begin_file(self) -> None:
        """The following examples are those of the next file."""
        self.number, self.renamed = self.number + 1, 0

    def distinct(self, example: Example) -> Example:
        """The example, with the number of its file before its id if an earlier file has the id."""
        if self._seen.add(example.example_id):
            return example
        self.renamed += 1
        example_id = f"{self.number}/{example.example_id}"
        while not self._seen.add(example_id):
            example_id = f"{self.number}/{example_id}"
        return replace(example, example_id=example_id)


def _usable(source: DataSource, report: ReadReport) -> Iterator[Example]:
    validator = Validator(source.purpose, source.version_2_with_negative, report)
    ids = _IdsOfFiles()
    for path in source.files:
        if source.by_file:
            validator = Validator(source.purpose, source.version_2_with_negative, report)
            report.examples_by_file.append(0)
            ids.begin_file()
        usable_before = report.usable
        rejected_before = dict(report.rejected_by_reason)
        notes: list[str] = []
        passages = read_passages(
            path,
            source.columns,
            source.version_2_with_negative,
            source.encoding,
            purpose="train" if source.validation else source.purpose,  # a part of the training data is held out
            notes=notes,
        )
        try:
            for passage in recount(passages, notes):
                if _is_taken(source, passage):
                    found = validator.examples(passage)
                    yield from map(ids.distinct, found) if source.by_file else found
        finally:  # also where only the first questions are read
            if ids.renamed:
                notes.append(f"{ids.renamed:,} ids that an earlier file has too begin with {ids.number}/ here")
            report.notes += [f"{os.path.basename(path)}: {note}" for note in notes]
        if report.usable == usable_before:
            raise UserError(f"{path}: no usable question: {_why_nothing(path, source, report, rejected_before)}")


def _why_nothing(path: str, source: DataSource, report: ReadReport, rejected_before: dict[str, int]) -> str:
    """Why a file has no usable question, and what to do."""
    rejected = {
        reason: count - rejected_before.get(reason, 0)
        for reason, count in report.rejected_by_reason.items()
        if count > rejected_before.get(reason, 0)
    }
    if rejected:
        first = str(report.rejected[-sum(rejected.values())]).removeprefix(f"{path}: ")
        return f"rejected {list_counts(rejected)}; the first: {first}"
    if source.validation is not None:
        ratio = source.validation[0]
        return (
            f"none of its contexts is drawn for {source.purpose} at validation_split {ratio}: pass another ratio or "
            "--seed, or a file of its own as --predict_file"
        )
    return f"it holds no questions: write some into it; read are {LAYOUTS}"
