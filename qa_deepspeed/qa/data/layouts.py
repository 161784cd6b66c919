"""Layouts of other programs: their rows and questions under the names that this package reads.

Sources: MRQA 2019 (`detected_answers`, `char_spans` with their ends included), KorQuAD 2 (`answer`), DPR
(`positive_ctxs`), Label Studio (`data`, `annotations`, spans with `start` and `end`), doccano (`text`, `label`), pandas
(`to_json` by columns), tables with an answer's text and start in columns of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qa_deepspeed.qa.data.answers import answers_in_cell, is_missing


@dataclass(frozen=True)
class ColumnNames:
    """What the columns of flat rows are called. Nested SQuAD JSON always has its own names.

    answer_text and answer_start: columns of a table with one answer in each row; None: those of their usual names that
    the table has.
    """

    id: str = "id"
    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    is_impossible: str = "is_impossible"
    answer_text: str | None = None
    answer_start: str | None = None


TEXT_COLUMNS = ("answer_text", "answer", "answers", "text")
START_COLUMNS = ("answer_start", "answer_start_char", "start_char", "start", "answer_begin")
"""Usual names of the columns of an answer, where no option names them."""

CONTEXT_COLUMNS = ("context", "text", "document", "passage", "paragraph")
"""Usual names of the context, where the row has no column of the name in `ColumnNames`."""

SPAN_LISTS = ("label", "labels", "entities", "spans")
"""Names under which span labels are exported: `[begin, end, name]` or objects with `start` and `end`."""


def row_fields(row: Mapping[str, Any], columns: ColumnNames) -> tuple[Any, dict[str, Any]]:
    """The context of a flat row, and the fields of its question: id, question, answers, is_impossible."""
    row = _task_of_label_studio(row)
    context = _context(row, columns)
    fields = {
        "id": row.get(columns.id),
        "question": row.get(columns.question),
        "answers": row.get(columns.answers),
        "is_impossible": row.get(columns.is_impossible),
    }
    if not isinstance(fields["answers"], (list, dict)):
        other = _answers_in_columns(row, columns, context)
        fields["answers"] = answers_in_cell(fields["answers"]) if other is None else other
    return context, {**fields, "answers": _as_answers(fields["answers"])}


def question_fields(fields: Any) -> Any:
    """A question of nested JSON with its answers under `answers`, as dicts of text and answer_start."""
    if not isinstance(fields, dict):
        return fields
    if "detected_answers" in fields:  # MRQA: the id of the question is its qid
        return {**fields, "id": fields.get("qid", fields.get("id")), "answers": _detected(fields)}
    if "answers" not in fields and "answer" in fields:
        return {**fields, "answers": _as_answers(fields["answer"])}
    answers = fields.get("answers")
    if isinstance(answers, list) and any(isinstance(one, str) for one in answers):
        return {**fields, "answers": _as_answers(answers)}
    return fields


def is_header(entry: Any) -> bool:
    """Whether a line is the header of an MRQA file."""
    return isinstance(entry, dict) and set(entry) == {"header"}


def rows_of_columns(document: Mapping[str, Any], columns: ColumnNames) -> Iterator[dict[str, Any]] | None:
    """The rows of a table that pandas wrote: by columns, `{column: {index: value}}` or `{column: [values]}`, by rows,
    `{index: {column: value}}`, or `{"columns": [...], "data": [[values]]}`.

    None if the document is something else.
    """
    values = list(document.values())
    if values and all(isinstance(one, dict) and columns.question in one for one in values):
        return iter(values)
    names: Any = document.get("columns")
    lists: Any = document.get("data")
    is_split = isinstance(names, list) and columns.question in names and isinstance(lists, list)
    if is_split and all(isinstance(row, list) and len(row) == len(names) for row in lists):
        return (dict(zip(names, row, strict=True)) for row in lists)
    if columns.question not in document or not values:
        return None
    if all(isinstance(one, dict) for one in values) and all(one.keys() == values[0].keys() for one in values):
        return ({name: column[index] for name, column in document.items()} for index in values[0])
    if all(isinstance(one, list) for one in values) and all(len(one) == len(values[0]) for one in values):
        return ({name: column[i] for name, column in document.items()} for i in range(len(values[0])))
    return None


def splits_of(document: Mapping[str, Any]) -> list[str]:
    """The names of the splits of a document that is a dict of them, each a list of rows or SQuAD JSON of its own; none
    for anything else."""
    if not document or {"question", "context", "qas", "paragraphs"} & document.keys():
        return []
    return list(document) if all(map(_is_split, document.values())) else []


def _is_split(rows: Any) -> bool:
    if isinstance(rows, dict):
        rows = rows.get("data")
    return isinstance(rows, list) and all(isinstance(row, dict) for row in rows)


SPLITS = {
    "train": (("train", "training"),),
    "evaluate": (("validation", "valid", "val", "dev", "development", "eval"), ("test", "testing")),
}
"""Purpose -> usual names of its split; those of a later group only where there is none of an earlier one."""


def split_for(purpose: str, names: Sequence[str]) -> str | None:
    """The split of these names that serves a purpose ("train" or "evaluate"); None if that is not clear."""
    if len(names) == 1:
        return names[0]
    for group in SPLITS[purpose]:
        found = [name for name in names if name.lower() in group]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _context(row: Mapping[str, Any], columns: ColumnNames) -> Any:
    if columns.context in row:
        return row[columns.context]
    passages = row.get("positive_ctxs")
    if isinstance(passages, list) and passages and isinstance(passages[0], dict):
        return passages[0].get("text")
    return next((row[name] for name in CONTEXT_COLUMNS if name in row and name != columns.answer_text), None)


def _answers_in_columns(
    row: Mapping[str, Any], columns: ColumnNames, context: Any
) -> list[dict[str, Any]] | str | None:
    """The answers of a row with columns for text and start, or with span labels.

    None if it has neither, "" if its cells are blank.
    """
    start_column = columns.answer_start or next((name for name in START_COLUMNS if name in row), None)
    answer = row.get("answer") if start_column else answers_in_cell(row.get("answer"))
    if isinstance(answer, (dict, list)):
        found: list[dict[str, Any]] = _as_answers(answer)
        return found
    for name in SPAN_LISTS:
        spans = answers_in_cell(row.get(name))
        if isinstance(spans, list):
            return [_of_span(span, context) for span in spans]
    is_context = columns.context not in row  # then "text" is the context
    known = (name for name in TEXT_COLUMNS if name in row and not (is_context and name in CONTEXT_COLUMNS))
    text_column = columns.answer_text or next(known, None)
    if text_column is None or text_column not in row or (start_column is None and columns.answer_text is None):
        return None
    text = row[text_column]
    if is_missing(text):
        said = row.get(columns.is_impossible)
        if is_missing(said):
            return "" if isinstance(said, str) else None  # blank cells say nothing
        return []
    return [{"text": text if isinstance(text, str) else str(text), "answer_start": row.get(start_column or "")}]


def _as_answers(answers: Any) -> Any:
    """Answers as dicts of text and answer_start, from a dict, texts alone, or spans with start and end."""
    if isinstance(answers, dict) and not isinstance(answers.get("text"), list):
        return [_of_span(answers, None)]
    if isinstance(answers, list) and any(not isinstance(one, dict) or "answer_start" not in one for one in answers):
        return [{"text": one, "answer_start": None} if isinstance(one, str) else _of_span(one, None) for one in answers]
    return answers


def _of_span(span: Any, context: Any) -> dict[str, Any]:
    """One answer from `[begin, end, ...]` or an object with `start`, and `text` or `end`."""
    if isinstance(span, list) and len(span) > 1:
        span = {"start": span[0], "end": span[1]}
    if not isinstance(span, dict):
        return {"text": None, "answer_start": None}
    start = span.get("answer_start", span.get("start", span.get("start_offset")))
    end = span.get("end", span.get("end_offset"))
    text = span.get("text")
    if text is None and isinstance(context, str) and type(start) is int and type(end) is int:
        text = context[start:end]
    return {"text": text, "answer_start": start}


def _detected(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """MRQA's answers: each place of a detected answer, then the texts that were not detected."""
    found: list[dict[str, Any]] = []
    detected = fields["detected_answers"] if isinstance(fields["detected_answers"], list) else []
    for answer in detected:
        if isinstance(answer, dict):
            spans = answer.get("char_spans") or [[None]]
            found += [{"text": answer.get("text"), "answer_start": span[0] if span else None} for span in spans]
    texts = {answer["text"] for answer in found}
    others = fields.get("answers")
    for text in others if isinstance(others, list) else []:
        if isinstance(text, str) and text not in texts:
            found.append({"text": text, "answer_start": None})
    return found


def _task_of_label_studio(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A task of Label Studio's full export as a flat row; any other row as it is."""
    data, annotations = row.get("data"), row.get("annotations")
    if not isinstance(data, dict) or not isinstance(annotations, list):
        return row
    spans = [
        result["value"]
        for annotation in annotations
        if isinstance(annotation, dict)
        for result in annotation.get("result") or []
        if isinstance(result, dict) and isinstance(result.get("value"), dict) and "start" in result["value"]
    ]
    return {"id": row.get("id"), **data, "answer": spans}
