"""Many documents searched for one answer: read them, answer in each, and rank the answers by null odds."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from qa_deepspeed.inference.inputs import QUESTIONS_AT_ONCE, AnswerFunction
from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.data.files import one_clear_error, open_text, uncompressed_name
from qa_deepspeed.qa.data.formats import ColumnNames, read_passages
from qa_deepspeed.qa.data.reading import resolve_files
from qa_deepspeed.qa.decoding.predictions import NO_SPAN_NULL_ODDS
from qa_deepspeed.utils.errors import UserError

Document = tuple["str | int", str]
"""Name, or number where there is none, and text."""

Contexts = Mapping[str, str] | Iterable["str | tuple[str | int, str]"]
"""Documents as an answerer takes them: texts, pairs of name and text, or texts by name."""

TEXTS = (".txt", ".md")
ROWS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".xlsx")
"""Endings of files that are one document, and of those whose rows are."""


def for_all_documents(
    answer: AnswerFunction,
    inputs: tuple[Any, ...],
    question: Any,
    contexts: Contexts,
    top_k: int,
    threshold: float | None,
) -> Any:
    """The result for a question, or a list of results for a list of questions; documents are read once.

    Args: as `best_documents`; `inputs` may have the question in place of `question`.
    Raises:
        UserError: no question, or a document that is no text.
    """
    asked = inputs[0] if len(inputs) == 1 and question is None else question
    questions = [asked] if isinstance(asked, str) else asked
    if not isinstance(questions, (list, tuple)) or not all(isinstance(one, str) and one.strip() for one in questions):
        raise UserError("with contexts, pass question=, a string or a list of strings that are not blank")
    documents = _named(contexts)
    several = list(documents) if len(questions) > 1 else documents
    results = [best_documents(answer, one, several, top_k, threshold) for one in questions]
    return results[0] if isinstance(asked, str) else results


def best_documents(
    answer: AnswerFunction, question: str, documents: Iterable[Document], top_k: int, threshold: float | None
) -> Any:
    """The best answer of each of the `top_k` best documents, best first; one dict if it is one.

    A span's probability says how it compares with other spans of its own document. Across documents, answers are ranked
    by their document's null odds (null score minus the best span's score), lowest first; `score` is
    1 / (1 + exp(null odds)), the probability of the span against no answer (Clark and Gardner 2018 and the SQuAD 2.0
    baselines compare paragraphs so).

    Args:
        answer: gives for each example a dict of start, end, answer and null_odds, "" only where there is no span.
        threshold: null odds above which a document has no answer: "" comes before those. None: "" is no answer.
    """
    found: list[tuple[float, int, dict[str, Any]]] = []
    number = 0
    remaining = iter(documents)
    while part := list(islice(remaining, QUESTIONS_AT_ONCE)):
        results = answer([Example(str(place), question, text) for place, (_, text) in enumerate(part)])
        for (name, _), result in zip(part, results, strict=True):
            if result["answer"]:
                found.append((result["null_odds"], number, _row(result, name)))
            number += 1
        found = heapq.nsmallest(top_k, found)
    if not number:
        raise UserError("there is no document: contexts is empty")
    answers = [row for _, _, row in found]
    place = sum(odds <= threshold for odds, _, _ in found) if threshold is not None else len(answers)
    if threshold is not None or not answers:
        lowest = found[0][0] if found else NO_SPAN_NULL_ODDS
        null = {"score": 1 - _probability(lowest), "start": 0, "end": 0, "answer": "", "document": None}
        answers.insert(place, null | {"null_odds": lowest})
    return answers[0] if len(answers[:top_k]) == 1 else answers[:top_k]


def _row(result: Mapping[str, Any], name: str | int) -> dict[str, Any]:
    odds = result["null_odds"]
    places = {key: result[key] for key in ("start", "end", "answer")}
    return {"score": _probability(odds), **places, "document": name, "null_odds": odds}


def _probability(odds: float) -> float:
    """1 / (1 + exp(odds)), for odds of any size."""
    return math.exp(-odds) / (1 + math.exp(-odds)) if odds > 0 else 1 / (1 + math.exp(odds))


def _named(contexts: Contexts) -> Iterator[Document]:
    """The documents with their names, or numbers from 0."""
    if isinstance(contexts, str):
        raise UserError("contexts is a list of texts, or a dict of texts by name: pass one text as context=")
    for number, one in enumerate(contexts.items() if isinstance(contexts, Mapping) else contexts):
        name, text = one if isinstance(one, tuple) and len(one) == 2 else (number, one)
        if not isinstance(text, str):
            raise UserError(f"document {name} is a {type(text).__name__}, not a text")
        if text.strip():
            yield name, text


def document_files(given: Iterable[str]) -> list[str]:
    """The files of documents that paths, folders and glob patterns name; those of a folder sorted by their path.

    Raises:
        UserError: a path does not exist, a folder holds none, or a file is of another kind.
    """
    files: list[str] = []
    for path in given:
        if Path(path).expanduser().is_dir():
            inside = sorted(str(file) for file in Path(path).expanduser().rglob("*") if _is_document(file))
            if not inside:
                raise UserError(f"{path}: the folder holds no documents: {', '.join((*TEXTS, *ROWS))} are read")
            files += inside
            continue
        for file in resolve_files([path]):
            if not uncompressed_name(file).endswith((*TEXTS, *ROWS)):
                raise UserError(f"{file}: not a kind of document that is read: {', '.join((*TEXTS, *ROWS))} are")
            files.append(file)
    return list(dict.fromkeys(files))


def _is_document(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts if part not in (".", ".."))
    return file.is_file() and not hidden and uncompressed_name(file.name).endswith((*TEXTS, *ROWS))


def read_documents(
    files: Iterable[str], columns: ColumnNames, encoding: str | None, left_out: Callable[[str], None]
) -> Iterator[Document]:
    """Each text file as a document named by its path, and each row of the others, named by its id or its place.

    Args:
        columns: those of the id and of the context, which holds the text, count.
        left_out: called with a line about each document without text.
    Raises:
        UserError: as `formats.read_passages`.
    """
    for file in files:
        if uncompressed_name(file).endswith(TEXTS):
            with one_clear_error(file), open_text(file, encoding) as opened:
                text = opened.read()
            if text.strip():
                yield file, text
            else:
                left_out(f"{file}: no text")
            continue
        for passage in read_passages(file, columns, True, encoding, needed=("context",)):
            fields = passage.questions[0] if passage.questions and not passage.numbered else None
            name = fields.get("id") if isinstance(fields, dict) else None
            if passage.fault or not isinstance(passage.context, str) or not passage.context.strip():
                left_out(f"{passage.where}: {passage.fault or 'no text: name its column with --context_column'}")
            else:
                yield passage.where if name is None or name == "" else str(name), passage.context
