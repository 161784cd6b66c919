"""`qa-deepspeed predict`: answers for a file of questions, or for one about a text or many documents."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, tee
from pathlib import Path
from typing import Any

from qa_deepspeed.inference.documents import document_files, read_documents
from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.data.formats import ColumnNames, read_passages
from qa_deepspeed.qa.data.read_report import SHOWN_REJECTED, ReadReport
from qa_deepspeed.qa.data.reading import resolve_files
from qa_deepspeed.qa.data.validation import Passage, Validator
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import as_json, output_file, refuse_same_file

STANDARD_INPUT = "-"
COLUMNS = ("id", "question", "context")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `predict`; lengths and answers are those of `QuestionAnswerer`."""
    _add_inputs(parser)
    _add_answers(parser)
    _add_lengths(parser)
    parser.add_argument(
        "--batch_size",
        "--per_gpu_eval_batch_size",
        "--per_device_eval_batch_size",
        type=int,
        help="windows of one forward pass (default: as many as suit the device)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:0 ... (default: a GPU if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as the model was saved)")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    """Questions, contexts, the model, and where the answers go."""
    add = parser.add_argument
    add(
        "input",
        nargs="?",
        metavar="FILE",
        help="questions: SQuAD JSON, rows as JSON lines, CSV or Parquet with "
        "question and context (an id, if they have one); - for standard input (JSON)",
    )
    add("--model_name_or_path", required=True, help="folder or hub name of a trained model")
    add("--question", help="one question, instead of a file")
    add("--context", help="the text that answers it")
    add(
        "--documents",
        nargs="+",
        metavar="PATH",
        help="instead of a context: files and folders to search for the answer; a .txt or .md file is one document, "
        "each row of a JSON, JSON lines, CSV, Parquet or Excel file with a context column another",
    )
    for name in COLUMNS:
        add(f"--{name}_column", default=name, help=f"column of rows that holds the {name} (default {name})")
    add("--encoding", help="encoding of the text (default: UTF-8, or what a byte order mark says)")
    add(
        "--output",
        metavar="FILE",
        help="where to write: JSON lines with score, start, end and answer of each "
        "question, or, where the name ends in .json, one object {id: answer} as `score` takes it; left out, lines go "
        "to the screen",
    )


def _add_answers(parser: argparse.ArgumentParser) -> None:
    """How many answers, and which."""
    add = parser.add_argument
    add("--top_k", type=int, default=1, help="answers to each question (default 1)")
    add(
        "--n_best_size",
        type=int,
        help="add null odds and an n-best list of this size to each line, as evaluate decodes them",
    )
    add(
        "--handle_impossible_answer",
        "--version_2_with_negative",
        nargs="?",
        const="true",
        choices=("true", "false"),
        help='whether "" is an answer; left out, where the model holds a threshold for it',
    )
    add(
        "--null_score_diff_threshold",
        type=float,
        help="answer nothing where null odds exceed this (default: as tuned, if the model holds it)",
    )
    add(
        "--align_to_words",
        choices=("true", "false"),
        default="true",
        help="widen answers to whole words; false for text without blanks, such as Japanese (default true)",
    )


def _add_lengths(parser: argparse.ArgumentParser) -> None:
    """Lengths in tokens."""
    add = parser.add_argument
    add(
        "--max_seq_len",
        "--max_seq_length",
        type=int,
        help="tokens of a window and question (default: as trained, or 384)",
    )
    add(
        "--doc_stride",
        type=int,
        help="tokens that neighbouring windows share, or with doc_stride_is step those from one to the next "
        "(default: as trained, or 128)",
    )
    add("--doc_stride_is", choices=("step", "overlap"), help="meaning of doc_stride (default: as trained, or overlap)")
    add(
        "--max_question_len",
        "--max_query_length",
        type=int,
        help="longest question in tokens (default: as trained, or what a window has room for)",
    )
    add(
        "--max_answer_len",
        "--max_answer_length",
        type=int,
        help="longest answer in tokens (default: as trained, or 15)",
    )


LENGTHS = ("max_seq_len", "doc_stride", "doc_stride_is", "max_question_len", "max_answer_len")


def run(arguments: argparse.Namespace) -> int:
    """Answer, and write.

    Raises:
        UserError: arguments that do not go together, a file that cannot be read, or a model that cannot be used.
    """
    one = arguments.question is not None or arguments.context is not None or arguments.documents is not None
    complete = arguments.question is not None and (arguments.context is None) != (arguments.documents is None)
    if one == (arguments.input is not None) or (one and not complete):
        raise UserError("pass a file of questions (or -), or --question together with --context or --documents")
    if arguments.documents is not None:
        return _search(arguments)
    if arguments.output and not one and arguments.input != STANDARD_INPUT:
        refuse_same_file(Path(arguments.output), resolve_files([arguments.input]))
    report = ReadReport()
    passages = (
        nullcontext(iter([Passage("--question", arguments.context, [{"question": arguments.question}], False)]))
        if one
        else _passages(arguments, report.notes)
    )
    with passages as read:
        examples = _examples(read, report)
        first = next(examples, None)
        if first is None:
            raise UserError(f"{arguments.input or '--question'}: nothing to answer ({report.summary()})")
        _write(_answered(chain([first], examples), arguments), arguments.output)
    if report.rejected or report.notes:
        print("\n".join([report.summary(), *report.left_out()]), file=sys.stderr)
    return 0


def _write(rows: Iterator[dict[str, Any]], output: str | None) -> None:
    """Write the rows as lines, or their best answers as one object where the name ends in .json."""
    with nullcontext(sys.stdout) if output is None else output_file(Path(output)) as out:
        if (output or "").endswith(".json"):
            out.write(as_json({row["id"]: _best(row)["answer"] for row in rows}))
        else:
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _search(arguments: argparse.Namespace) -> int:
    """Answer one question from many documents."""
    if arguments.n_best_size is not None:
        raise UserError("--n_best_size is for one context: with --documents, --top_k gives more answers")
    files = document_files(arguments.documents)
    if arguments.output:
        refuse_same_file(Path(arguments.output), files)
    left_out: list[str] = []
    documents = read_documents(files, _columns(arguments), arguments.encoding, left_out.append)
    first = next(documents, None)
    if first is None:
        raise UserError(f"no document has a text: {left_out[0]}")
    answerer, settings = _answerer(arguments)
    found = answerer(
        arguments.question, contexts=chain([first], documents), top_k=arguments.top_k, progress=True, **settings
    )
    row = {"id": "1", "question": arguments.question}
    _write(iter([row | ({"answers": found} if isinstance(found, list) else found)]), arguments.output)
    shown = [f"left out: {line}" for line in left_out[:SHOWN_REJECTED]]
    if len(left_out) > len(shown):
        shown.append(f"... and {len(left_out) - len(shown):,} more")
    if shown:
        print("\n".join(shown), file=sys.stderr)
    return 0


def _answerer(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model, and the arguments of its calls, which are printed as they work out."""
    from qa_deepspeed.inference.answerer import QuestionAnswerer

    answerer = QuestionAnswerer.from_pretrained(
        arguments.model_name_or_path, device=arguments.device, dtype=arguments.dtype, batch_size=arguments.batch_size
    )
    if arguments.null_score_diff_threshold is not None:
        answerer.threshold = arguments.null_score_diff_threshold
    impossible = arguments.handle_impossible_answer
    settings = {
        "handle_impossible_answer": None if impossible is None else impossible == "true",
        "align_to_words": arguments.align_to_words == "true",
        **{name: getattr(arguments, name) for name in LENGTHS},
    }
    print(f"answering with {answerer.describe(**settings)}", file=sys.stderr)
    return answerer, settings


def _answered(examples: Iterator[Example], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each example: id, question, then the answer, or with top_k the answers."""
    answerer, settings = _answerer(arguments)
    asked, examples = tee(examples)  # holds the questions that are asked and not answered yet
    found = answerer(asked, top_k=arguments.top_k, n_best_size=arguments.n_best_size, progress=True, **settings)
    for example, answer in zip(examples, found, strict=True):
        row: dict[str, Any] = {"id": example.example_id, "question": example.question}
        if arguments.top_k > 1:
            yield row | {"answers": answer if isinstance(answer, list) else [answer]}
        else:
            yield row | answer


def _best(row: dict[str, Any]) -> dict[str, Any]:
    return row["answers"][0] if "answers" in row else row


def _examples(passages: Iterator[Passage], report: ReadReport) -> Iterator[Example]:
    """The questions that can be asked; rows that have no id get their number, the first being 1."""
    validator = Validator("evaluate", True, report)
    number = 0
    for passage in passages:
        for fields in passage.questions:
            number += 1
            if isinstance(fields, dict) and fields.get("id") is None:
                fields["id"] = str(number)
        yield from validator.examples(passage)


def _columns(arguments: argparse.Namespace) -> ColumnNames:
    return ColumnNames(**{name: getattr(arguments, f"{name}_column") for name in COLUMNS})


@contextmanager
def _passages(arguments: argparse.Namespace, notes: list[str]) -> Iterator[Iterator[Passage]]:
    """The passages of a file, or of standard input, which is copied first: formats are detected from content."""
    columns = _columns(arguments)
    if arguments.input != STANDARD_INPUT:
        files = resolve_files([arguments.input])
        yield chain.from_iterable(read_passages(file, columns, True, arguments.encoding, notes=notes) for file in files)
        return
    with tempfile.NamedTemporaryFile(suffix=".json") as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy)
        copy.flush()
        try:
            yield read_passages(copy.name, columns, True, arguments.encoding)
        except UserError as error:
            raise UserError(str(error).replace(copy.name, "standard input")) from None
