"""Read the files that are scored: gold files, predictions and null odds. No question is skipped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from qa_deepspeed.qa.data.examples import Answer
from qa_deepspeed.qa.data.files import distinct_names
from qa_deepspeed.qa.data.reading import DataSource, ReadReport, read_examples
from qa_deepspeed.qa.decoding.predictions import NBEST_FIELDS, NBestEntry
from qa_deepspeed.qa.metrics.squad import Gold
from qa_deepspeed.utils.errors import UserError


class GoldFile(NamedTuple):
    """The questions of a gold file, and what else scores and comparisons need of them."""

    questions: list[Gold]
    version_2: bool
    contexts: dict[str, str]  # by question id
    wording: dict[str, str]  # the question's text by question id
    without_gold: list[str]  # ids of questions whose gold answers are not known; they are not among the others
    starts: dict[str, tuple[int, ...]]  # by question id, where the file says that each gold text begins; -1 if nowhere
    left_out: tuple[str, ...] = ()  # lines about rows that cannot be read
    files: Mapping[str, str] = MappingProxyType({})  # by question id, the name of its file if there are several

    def places(self, question: Gold) -> list[Answer]:
        """The gold texts of a question with their places, -1 where the context does not have the text there."""
        context = self.contexts[question.example_id]
        starts = self.starts[question.example_id]
        return [
            Answer(text, start if start >= 0 and context.startswith(text, start) else -1)
            for text, start in zip(question.texts, starts, strict=True)
        ]


def read_gold(path: str) -> GoldFile:
    """All questions of a gold file, in file order.

    In nested SQuAD JSON those are among them that training would reject, and the rules of v2.0 apply if `version` is 2
    or a question has `is_impossible`; no question of v1.1 is unanswerable. Any other file that evaluations read is read
    as they do, and the rules of v2.0 apply if a question is unanswerable. Unanswerable is what has an empty list of
    answers or is_impossible.

    Raises:
        UserError: the file cannot be read, or has questions but no gold answers; the message names the place.
    """
    document = _nested_document(path)
    gold = _gold_of_rows(path) if document is None else _gold_of_articles(document, path)
    if gold.without_gold and not gold.questions:
        raise UserError(
            f"{path}: none of its {len(gold.without_gold)} questions has gold answers (a list under 'answers'): there "
            "is nothing to score against"
        )
    return gold


def read_gold_files(paths: Sequence[str]) -> GoldFile:
    """The questions of several gold files as those of one.

    An id that an earlier file has too gets the number of its file in front (`2/ID`), as in evaluations.

    Raises:
        UserError: as `read_gold`.
    """
    if len(paths) == 1:
        return read_gold(paths[0])
    merged, version_2 = GoldFile([], False, {}, {}, [], {}), False
    files: dict[str, str] = {}
    left_out: list[str] = []
    for number, (path, name) in enumerate(zip(paths, distinct_names(paths), strict=True), 1):
        one = read_gold(path)
        ids = {}
        for example_id, context in one.contexts.items():
            distinct = example_id
            while distinct in merged.contexts:
                distinct = f"{number}/{distinct}"
            ids[example_id] = distinct
            merged.contexts[distinct], files[distinct] = context, name
            merged.wording[distinct] = one.wording[example_id]
            merged.starts[distinct] = one.starts.get(example_id, ())
        merged.questions.extend(question._replace(example_id=ids[question.example_id]) for question in one.questions)
        merged.without_gold.extend(ids[example_id] for example_id in one.without_gold)
        left_out += one.left_out
        version_2 = version_2 or one.version_2
    return merged._replace(version_2=version_2, left_out=tuple(left_out), files=files)


def _nested_document(path: str) -> dict[str, Any] | None:
    """The document of a file of nested SQuAD JSON; None for any other format that evaluations read."""
    if not path.lower().endswith(".json"):
        return None
    try:
        document = _read_json(path)
    except UserError:
        if _is_json_lines(path):
            return None
        raise
    data = document.get("data", document) if isinstance(document, dict) else document
    articles = data if isinstance(data, list) and all(isinstance(one, dict) for one in data) else []
    nested = any("paragraphs" in one for one in articles)
    if isinstance(document, dict) and isinstance(document.get("data"), list) and (nested or not articles):
        return document
    if articles or (isinstance(document, dict) and document and "data" not in document):
        return None
    raise UserError(f"{path}: not SQuAD JSON: an object with a list of articles under 'data' is expected")


def _is_json_lines(path: str) -> bool:
    """Whether the first line that is not blank is JSON itself."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
            return isinstance(json.loads(first), (dict, list))
    except (OSError, ValueError, RecursionError):
        return False


def _gold_of_rows(path: str) -> GoldFile:
    report = ReadReport()
    source = DataSource((path,), "evaluate", version_2_with_negative=True)
    gold = GoldFile([], False, {}, {}, [], {})
    for example in read_examples(source, report):
        gold.contexts[example.example_id], gold.wording[example.example_id] = example.context, example.question
        if example.has_gold:
            texts = tuple(answer.text for answer in example.answers)
            gold.questions.append(Gold(example.example_id, texts))
            gold.starts[example.example_id] = tuple(answer.start for answer in example.answers)
        else:
            gold.without_gold.append(example.example_id)
    return gold._replace(version_2=report.unanswerable > 0, left_out=tuple(report.left_out()))


def _gold_of_articles(document: dict[str, Any], path: str) -> GoldFile:
    gold = GoldFile([], _says_version_2(document.get("version")), {}, {}, [], {})
    impossible_seen = False
    for i, article in enumerate(document["data"]):
        for j, paragraph in enumerate(_list(article, "paragraphs", f"{path}: data[{i}]")):
            where = f"{path}: data[{i}].paragraphs[{j}]"
            for k, question in enumerate(_list(paragraph, "qas", where)):
                one = _gold(question, f"{where}.qas[{k}]")
                if one.texts or question.get("answers") is not None or question.get("is_impossible"):
                    gold.questions.append(one)
                    gold.starts[one.example_id] = _starts(question.get("answers"), len(one.texts))
                else:
                    gold.without_gold.append(one.example_id)
                gold.contexts[one.example_id] = str(paragraph.get("context", ""))
                gold.wording[one.example_id] = str(question.get("question", ""))
                impossible_seen = impossible_seen or "is_impossible" in question
    if gold.version_2 or impossible_seen:
        gold = gold._replace(version_2=True)
    else:
        without = gold.without_gold + [one.example_id for one in gold.questions if not one.texts]
        gold = gold._replace(questions=[one for one in gold.questions if one.texts], without_gold=without)
    return gold


def read_predictions(path: str) -> dict[str, str]:
    """{question id: answer text}, from a JSON object or from the lines that `predict` writes.

    Raises:
        UserError: the file cannot be read or holds anything else.
    """
    if _is_json_lines(path) and (lines := _predicted_lines(path)):
        return lines
    values = _read_object(path, "answer texts by question id")
    for example_id, text in values.items():
        if not isinstance(text, str):
            hint = "; is this an n-best file? give predictions.json" if isinstance(text, list) else ""
            raise UserError(f"{path}: the prediction of {example_id!r} is {_kind(text)}, not a text{hint}")
    return values


def _predicted_lines(path: str) -> dict[str, str]:
    """{question id: answer text} of JSON lines with `id`, and `answer` or `answers`; none for another file."""
    found: dict[str, str] = {}
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            best = row["answers"][0] if isinstance(row, dict) and isinstance(row.get("answers"), list) else row
            if not isinstance(row, dict) or "id" not in row or not isinstance(best, dict) or "answer" not in best:
                if not found:
                    return {}
                raise UserError(
                    f"{path}: line {number}: not a line of predict, with id and answer: write the file again"
                )
            found[str(row["id"])] = str(best["answer"])
    return found


def read_null_odds(path: str) -> dict[str, float]:
    """{question id: null odds}.

    Raises:
        UserError: the file cannot be read or holds anything else.
    """
    values = _read_object(path, "numbers by question id")
    for example_id, odds in values.items():
        if isinstance(odds, bool) or not isinstance(odds, int | float) or math.isnan(odds):
            raise UserError(f"{path}: the null odds of {example_id!r} are {_kind(odds)}, not a number")
    return values


def read_nbest(path: str) -> dict[str, list[NBestEntry]]:
    """{question id: n-best entries}; an entry without a start gets -1.

    Raises:
        UserError: the file cannot be read or holds anything else.
    """
    values = _read_object(path, "n-best lists by question id")
    for example_id, entries in values.items():
        if not isinstance(entries, list) or not entries:
            raise UserError(f"{path}: {example_id!r} has {_kind(entries)} where an n-best list is expected")
        for entry in entries:
            numbers = (
                [entry.get(name) for name in ("probability", "start_logit", "end_logit")] if _is_entry(entry) else []
            )
            if not numbers or not all(isinstance(number, int | float) for number in numbers):
                raise UserError(
                    f"{path}: an entry of {example_id!r} lacks text, probability, start_logit or end_logit; "
                    "give an nbest_predictions.json"
                )
    fields = NBEST_FIELDS[:-1]
    return {
        example_id: [(*(entry[name] for name in fields), entry.get("start", -1)) for entry in entries]
        for example_id, entries in values.items()
    }


def best_spans(nbest: Mapping[str, list[NBestEntry]], predictions: Mapping[str, str]) -> dict[str, str] | None:
    """The best span of each question whatever its null odds, as in the evaluation that wrote both files; None where the
    n-best lists are not those of these predictions."""
    spans: dict[str, str] = {}
    for example_id, text in predictions.items():
        texts = [entry[0] for entry in nbest.get(example_id, [])]
        if not texts or (text and text not in texts):
            return None
        spans[example_id] = next(filter(None, texts), "")
    return spans


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("text"), str)


def _says_version_2(version: Any) -> bool:
    return str(version or "").strip().lower().removeprefix("v").split(".")[0] == "2"


def _list(holder: Any, key: str, where: str) -> list[Any]:
    values = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(values, list):
        raise UserError(f"{where}: not SQuAD JSON: a list under '{key}' is expected")
    return values


def _gold(question: Any, where: str) -> Gold:
    if not isinstance(question, dict) or question.get("id") is None:
        raise UserError(f"{where}: a question without an id cannot be scored: add an id or remove the question")
    answers = question.get("answers") or []
    if isinstance(answers, dict):  # the columns that `datasets` makes of the list
        texts = answers.get("text") or []
    elif isinstance(answers, list):
        texts = [answer.get("text") if isinstance(answer, dict) else answer for answer in answers]
    else:
        texts = None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: the answers of question {question['id']} are not a list of texts")
    return Gold(str(question["id"]), tuple(texts))


def _starts(answers: Any, count: int) -> tuple[int, ...]:
    """The starts of `count` answers whose texts have been read; -1 where there is no whole number."""
    if isinstance(answers, dict):
        found = answers.get("answer_start")
    else:
        found = [answer.get("answer_start") if isinstance(answer, dict) else None for answer in answers or []]
    starts = found if isinstance(found, list) and len(found) == count else [None] * count
    return tuple(start if isinstance(start, int) and not isinstance(start, bool) else -1 for start in starts)


def _read_object(path: str, of_what: str) -> dict[str, Any]:
    values = _read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {_kind(values)}; a JSON object of {of_what} is expected")
    return values


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: str(value).lower()}
    return names.get(type(value), str(value))


def _read_json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); is it a JSON file?") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = " (the file ends there: truncated?)" if not text[error.pos :].strip() else ""
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}{cut}") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: unreadable JSON: {error}") from error
