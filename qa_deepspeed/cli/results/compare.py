"""`qa-deepspeed compare`: runs side by side, what differs, and whether F1 differs by more than chance; a page of it."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa_deepspeed.qa.data.reading import resolve_files
from qa_deepspeed.qa.decoding.predictions import NBEST_FILE, PREDICTIONS_FILE
from qa_deepspeed.qa.metrics.compare import explain
from qa_deepspeed.qa.metrics.prediction_files import GoldFile, read_gold_files, read_nbest, read_predictions
from qa_deepspeed.qa.report.comparison import SIGNIFICANT, SystemAnswers, comparison_page, verdict
from qa_deepspeed.qa.report.page import now
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import output_file
from qa_deepspeed.utils.json_files import ANYTHING, DamagedFile, read_json

ABSENT = "-"

SHOWN_DIGITS = 12
"""Of a checksum: enough to tell two apart."""

RECORD = {"identity": {str: ANYTHING}, "options?": {str: ANYTHING}, "metrics?": {str: ANYTHING}}
"""What is compared of run.json, by `json_files.fault_of`."""

IGNORED_OPTIONS = {"output_dir", "overwrite_output_dir", "overwrite_cache", "cache_dir"}
"""Places of files, which do not change the outcome."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `compare`."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output folders of training runs, the first to compare the others with"
    )
    parser.add_argument(
        "--gold",
        metavar="FILE",
        help="the questions that the runs answered, in any format that evaluate reads; several files with commas "
        "between (default: the predict_file that they name)",
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="with two runs: write a page (HTML) of the questions that one wins and the other loses",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison.

    Raises:
        UserError: fewer than two runs, or a folder that holds none.
    """
    if len(arguments.runs) < 2:
        raise UserError("compare needs two runs or more: qa-deepspeed compare RUN RUN ...")
    if arguments.report and len(arguments.runs) != 2:
        raise UserError("--report FILE shows two runs: name two, the first to compare the other with")
    records = [_read(Path(folder)) for folder in arguments.runs]
    first = Path(arguments.runs[0])
    pairs = [
        _pair(first, Path(other), records, arguments.gold, number) for number, other in enumerate(arguments.runs[1:], 1)
    ]
    tests = [_significance(pair) for pair in pairs]
    sections = {title: _rows(records, part, only_different) for title, part, only_different in SECTIONS}
    if arguments.report:
        _write_page(pairs[0], Path(arguments.report), sections)
    if arguments.json:
        print(json.dumps({"runs": arguments.runs, **sections, "significance": tests}))
        return 0
    for title, rows in sections.items():
        if rows:
            print("\n".join(_table(title, arguments.runs, rows)) + "\n")
    for test in tests:
        print(_test_in_words(test))
    if arguments.report:
        print(f"page: {arguments.report}")
    return 0


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        record: dict[str, Any] | None = read_json(path, RECORD)
    except DamagedFile as error:
        raise UserError(f"{error}: it is not the record of a training run, or damaged") from None
    if record is None:
        raise UserError(f"{folder} holds no training run: there is no {path}")
    return record


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, keys joined by dots; lists stay whole."""
    if not isinstance(value, dict):
        return {prefix: value}
    parts = (_flat(inner, f"{prefix}.{name}" if prefix else str(name)) for name, inner in value.items())
    return {name: inner for part in parts for name, inner in part.items()}


def _part(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda record: _flat({name: record[name] for name in names if name in record})


def _options(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.get("options", {}).items() if name not in IGNORED_OPTIONS}


SECTIONS: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]], bool]] = [
    ("scores", lambda record: _flat(record.get("metrics", {})), False),
    ("cost", _part("seconds", "throughput", "peak_memory"), False),
    ("options that differ", _options, True),
    ("derived settings that differ", _part("identity", "ds_config"), True),
    ("data that differ", _part("data"), True),
    ("software and hardware that differ", _part("software", "hardware"), True),
]
"""Title, what of a record it shows, and whether it shows only what is not the same in all runs."""


def _rows(
    records: list[dict[str, Any]], part: Callable[[dict[str, Any]], dict[str, Any]], only_different: bool
) -> dict[str, list[Any]]:
    parts = [part(record) for record in records]
    names = dict.fromkeys(name for one in parts for name in one)
    rows = {name: [one.get(name) for one in parts] for name in names}
    return {name: row for name, row in rows.items() if not only_different or any(value != row[0] for value in row)}


def _table(title: str, runs: list[str], rows: dict[str, list[Any]]) -> list[str]:
    cells = [[title, *(Path(run).name or run for run in runs)]]
    cells += [[name, *map(_cell, row)] for name, row in rows.items()]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _cell(value: Any) -> str:
    if value is None:
        return ABSENT
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text[:SHOWN_DIGITS] + "..." if re.fullmatch("[0-9a-f]{64}", text) else text


@dataclass(frozen=True)
class _Pair:
    """Two runs' answers to the same questions, or why they cannot be compared question by question."""

    one: Path
    other: Path
    reason: str = ""
    gold: GoldFile | None = None
    gold_path: str = ""
    a: dict[str, str] | None = None
    b: dict[str, str] | None = None
    differences: dict[str, Any] | None = None
    language: str = "en"


def _pair(one: Path, other: Path, records: list[dict[str, Any]], gold: str | None, number: int) -> _Pair:
    options = [records[index].get("options", {}) for index in (0, number)]
    files = [given.get("predict_file") for given in options]
    if gold is None and files[0] != files[1]:
        reason = f"they answered different files ({files[0]} and {files[1]}); name one with --gold"
        return _Pair(one, other, reason)
    path = gold or files[0]
    try:
        paths = resolve_files([] if not path else [path] if Path(path).exists() else path.split(","))
    except UserError:
        paths = ()
    if not path or not paths:
        return _Pair(one, other, f"the questions they answered are not at {path}; name the file with --gold")
    language = options[0].get("metric_language", "en")
    try:
        a, b = (read_predictions(str(folder / PREDICTIONS_FILE)) for folder in (one, other))
        questions = read_gold_files(paths)
        return _Pair(one, other, "", questions, path, a, b, explain(questions, a, b, language), language)
    except UserError as error:
        return _Pair(one, other, str(error))


def _significance(pair: _Pair) -> dict[str, Any]:
    """The paired test of the two runs' F1, or why there is none."""
    names = {"a": str(pair.one), "b": str(pair.other)}
    if pair.differences is None:
        return {**names, "reason": pair.reason}
    kept = ("total", "f1_a", "f1_b", "f1_difference", "f1_difference_interval", "f1_p_value")
    found = {name: pair.differences[name] for name in kept}
    return {**names, **found, "more_than_chance": found["f1_p_value"] < SIGNIFICANT}


def _test_in_words(test: dict[str, Any]) -> str:
    if "reason" in test:
        return f"{test['b']} against {test['a']}: whether F1 differs by more than chance is unknown: {test['reason']}"
    return verdict(test["a"], test["b"], test)


def _write_page(pair: _Pair, path: Path, sections: dict[str, dict[str, list[Any]]]) -> None:
    """Write the page of two runs.

    Raises:
        UserError: their answers cannot be compared, or the file cannot be written.
    """
    if pair.gold is None or pair.a is None or pair.b is None or pair.differences is None:
        raise UserError(f"no page of {pair.other} against {pair.one}: {pair.reason}")
    folders = (pair.one, pair.other)
    names = _short_names(*folders)
    one, other = (
        SystemAnswers(name, answers, read_nbest(str(folder / NBEST_FILE)) if (folder / NBEST_FILE).exists() else {})
        for name, folder, answers in zip(names, folders, (pair.a, pair.b), strict=True)
    )
    about = {"Runs": f"{pair.one} and {pair.other}", "Data": pair.gold_path, "Date": now()}
    settings = [
        [name, *map(_cell, row)]
        for title, _, only_different in SECTIONS
        if only_different
        for name, row in sections[title].items()
    ]
    document = comparison_page(pair.gold, (one, other), pair.differences, pair.language, about, settings)
    with output_file(path) as file:
        file.write(document)


def _short_names(one: Path, other: Path) -> tuple[str, str]:
    """The names of the folders, or their paths where those are equal."""
    return (one.name, other.name) if one.name != other.name else (str(one), str(other))
