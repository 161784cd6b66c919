"""`qa-deepspeed convert`: any readable file as clean SQuAD v2 JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.data.layouts import ColumnNames
from qa_deepspeed.qa.data.read_report import ReadReport
from qa_deepspeed.qa.data.reading import DataSource, read_examples
from qa_deepspeed.utils.files import output_file, refuse_same_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `convert`."""
    parser.add_argument("input", nargs="+", metavar="FILE", help="questions in any format that train reads")
    parser.add_argument("output", type=Path, metavar="OUT", help="the SQuAD v2 JSON file to write")
    for field in dataclasses.fields(ColumnNames):
        default = f" (default {field.default})" if field.default else ""
        parser.add_argument(
            f"--{field.name}_column", default=field.default, help=f"column of rows that holds the {field.name}{default}"
        )
    parser.add_argument("--encoding", help="encoding of the text (default: UTF-8, or what a byte order mark says)")


def run(arguments: argparse.Namespace) -> int:
    """Write the questions that can be trained on; what is left out goes to standard error.

    Raises:
        UserError: a file cannot be read, has nothing usable, or is the output.
    """
    names = [field.name for field in dataclasses.fields(ColumnNames)]
    columns = ColumnNames(**{name: getattr(arguments, f"{name}_column") for name in names})
    files = DataSource.resolve(arguments.input)
    refuse_same_file(arguments.output, files)
    source = DataSource(files, "train", True, columns=columns, encoding=arguments.encoding)
    report = ReadReport()
    with output_file(arguments.output) as out:
        for part in squad_json(read_examples(source, report)):
            out.write(part)
    print("\n".join([f"{arguments.output}: {report.summary()}", *report.left_out()]), file=sys.stderr)
    return 0


def squad_json(examples: Iterable[Example]) -> Iterator[str]:
    """SQuAD v2.0 JSON of one article, a paragraph at a time; neighbouring questions about one context share one."""
    yield '{"version": "v2.0", "data": [{"title": "", "paragraphs": ['
    separator = "\n"
    for context, group in groupby(examples, key=lambda example: example.context):
        questions = [
            {
                "id": one.example_id,
                "question": one.question,
                "answers": [{"text": answer.text, "answer_start": answer.start} for answer in one.answers],
                "is_impossible": not one.answers,
            }
            for one in group
        ]
        yield separator + json.dumps({"context": context, "qas": questions}, ensure_ascii=False)
        separator = ",\n"
    yield "\n]}]}\n"
