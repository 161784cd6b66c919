"""`qa-deepspeed predict`: answers from a trained model, for a file of questions or for one."""

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

from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.data.formats import ColumnNames, read_passages
from qa_deepspeed.qa.data.read_report import ReadReport
from qa_deepspeed.qa.data.reading import resolve_files
from qa_deepspeed.qa.data.validation import Passage, Validator
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import as_json, output_file, refuse_same_file

STANDARD_INPUT = "-"
COLUMNS = ("id", "question", "context")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `predict`; lengths and answers are those of `QuestionAnswerer`."""
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
    add("--top_k", type=int, default=1, help="answers to each question (default 1)")
    add(
        "--n_best_size",
        type=int,
        help="add null odds and an n-best list of this size to each line, as evaluate decodes them",
    )
    add(
        "--handle_impossible_answer",
        choices=("true", "false"),
        help='whether "" is an answer; left out, where the model holds a threshold for it',
    )
    add("--max_seq_len", type=int, help="tokens of a window with the question (default: as trained, or 384)")
    add("--doc_stride", type=int, help="tokens that neighbouring windows share (default: as trained, or 128)")
    add("--max_answer_len", type=int, help="longest answer in tokens (default: as trained, or 15)")
    add(
        "--align_to_words",
        choices=("true", "false"),
        default="true",
        help="widen answers to whole words; false for text without blanks, such as Japanese (default true)",
    )
    add("--batch_size", type=int, help="windows of one forward pass (default: as many as suit the device)")
    add("--device", help="cpu, cuda, cuda:0 ... (default: a GPU if there is one)")
    add("--dtype", help="float32, bfloat16 or float16 (default: as the model was saved)")


def run(arguments: argparse.Namespace) -> int:
    """Answer, and write.

    Raises:
        UserError: arguments that do not go together, a file that cannot be read, or a model that cannot be used.
    """
    one = arguments.question is not None or arguments.context is not None
    if one == (arguments.input is not None) or (one and None in (arguments.question, arguments.context)):
        raise UserError("pass a file of questions (or -), or --question and --context together")
    if arguments.output and not one and arguments.input != STANDARD_INPUT:
        refuse_same_file(Path(arguments.output), resolve_files([arguments.input]))
    report = ReadReport()
    passages = (
        nullcontext(iter([Passage("--question", arguments.context, [{"question": arguments.question}], False)]))
        if one
        else _passages(arguments)
    )
    with passages as read:
        examples = _examples(read, report)
        first = next(examples, None)
        if first is None:
            raise UserError(f"{arguments.input or '--question'}: nothing to answer ({report.summary()})")
        answered = _answered(chain([first], examples), arguments)
        with nullcontext(sys.stdout) if arguments.output is None else output_file(Path(arguments.output)) as out:
            if (arguments.output or "").endswith(".json"):
                answers = {row["id"]: _best(row)["answer"] for row in answered}
                out.write(as_json(answers))
            else:
                for row in answered:
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
    if report.rejected:
        print("\n".join([report.summary(), *report.left_out()]), file=sys.stderr)
    return 0


def _answered(examples: Iterator[Example], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each example: id, question, then the answer, or with top_k the answers."""
    from qa_deepspeed.inference.answerer import QuestionAnswerer

    answerer = QuestionAnswerer.from_pretrained(
        arguments.model_name_or_path, device=arguments.device, dtype=arguments.dtype, batch_size=arguments.batch_size
    )
    names = ("top_k", "n_best_size", "max_seq_len", "doc_stride", "max_answer_len")
    asked, examples = tee(examples)  # holds the questions that are asked and not answered yet
    impossible = arguments.handle_impossible_answer
    found = answerer(
        asked,
        handle_impossible_answer=None if impossible is None else impossible == "true",
        align_to_words=arguments.align_to_words == "true",
        progress=True,
        **{name: getattr(arguments, name) for name in names},
    )
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


@contextmanager
def _passages(arguments: argparse.Namespace) -> Iterator[Iterator[Passage]]:
    """The passages of a file, or of standard input, which is copied first: formats are detected from content."""
    columns = ColumnNames(**{name: getattr(arguments, f"{name}_column") for name in COLUMNS})
    if arguments.input != STANDARD_INPUT:
        files = resolve_files([arguments.input])
        yield (passage for file in files for passage in read_passages(file, columns, True, arguments.encoding))
        return
    with tempfile.NamedTemporaryFile(suffix=".json") as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy)
        copy.flush()
        try:
            yield read_passages(copy.name, columns, True, arguments.encoding)
        except UserError as error:
            raise UserError(str(error).replace(copy.name, "standard input")) from None
