"""`qa-deepspeed score`: any system's predictions against a gold file, without a model."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from qa_deepspeed.qa.decoding.predictions import NBEST_FILE
from qa_deepspeed.qa.metrics.compare import explain, explanation_lines, paragraph_numbers
from qa_deepspeed.qa.metrics.normalization import METRIC_LANGUAGES
from qa_deepspeed.qa.metrics.prediction_files import (
    GoldFile,
    best_spans,
    read_gold,
    read_nbest,
    read_null_odds,
    read_predictions,
)
from qa_deepspeed.qa.metrics.significance import confidence_interval
from qa_deepspeed.qa.metrics.squad import score, score_answer
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.units import plural

NAMES_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `score`."""
    parser.add_argument(
        "gold", metavar="GOLD", nargs="?", help="SQuAD JSON, or any file that evaluate reads; it says which rules apply"
    )
    parser.add_argument(
        "predictions",
        metavar="PREDICTIONS",
        nargs="?",
        help='JSON {question id: answer text, "" for none}, or the lines that predict writes',
    )
    parser.add_argument("--null_odds", metavar="FILE", help="JSON {question id: number}, high if there is no answer")
    parser.add_argument(
        "--null_odds_threshold",
        type=_threshold,
        default=1.0,
        metavar="NUMBER|none",
        help="with --null_odds: answers whose null odds exceed this count as none, as the official script has it "
        "(default 1.0, the script's); 'none' takes the answers as they are",
    )
    parser.add_argument(
        "--metric_language",
        choices=METRIC_LANGUAGES,
        default="en",
        help="normalization and tokenization: en is the official one; zh, ja and th score by characters",
    )
    parser.add_argument(
        "--confidence",
        action="store_true",
        help="add 95%% bootstrap intervals of exact and f1 (resampled by paragraph)",
    )
    parser.add_argument(
        "--explain",
        nargs=3,
        metavar=("A", "B", "GOLD"),
        help="instead of scoring one file: where predictions A and B differ, what it costs, and a paired test",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line and nothing else")


def _threshold(text: str) -> float | None:
    if text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number nor 'none'")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Print the metrics of the predictions, or compare two files; remarks go to the standard error.

    Raises:
        UserError: a file that cannot be read or is not what it should be, or arguments that do not go together.
    """
    if arguments.explain:
        return _explain(arguments)
    if arguments.gold is None or arguments.predictions is None:
        raise UserError("score takes a gold file and a predictions file: qa-deepspeed score GOLD PREDICTIONS")
    gold = read_gold(arguments.gold)
    for line in gold.left_out:
        print(line, file=sys.stderr)
    predictions = _without(gold, read_predictions(arguments.predictions))
    null_odds = read_null_odds(arguments.null_odds) if arguments.null_odds else None
    if null_odds is not None and not gold.version_2:
        raise UserError(f"{arguments.gold} is SQuAD v1.1 data, where every question has an answer: drop --null_odds")
    spans, remark = (None, "") if null_odds is None else _best_spans(Path(arguments.predictions), predictions)
    metrics = score(
        gold.questions,
        predictions,
        null_odds,
        arguments.null_odds_threshold,
        version_2_with_negative=gold.version_2,
        language=arguments.metric_language,
        best_spans=spans,
    )
    if remark:
        print(remark, file=sys.stderr)
    ids = {question.example_id for question in gold.questions}
    names = {
        "missing_ids": list(dict.fromkeys(q.example_id for q in gold.questions if q.example_id not in predictions)),
        "extra_ids": [example_id for example_id in predictions if example_id not in ids],
        "ids_without_gold": gold.without_gold,
    }
    if null_odds is not None and arguments.null_odds_threshold is not None:
        blanked = [
            k for k in ids & predictions.keys() if predictions[k] and null_odds[k] > arguments.null_odds_threshold
        ]
        predictions = predictions | dict.fromkeys(blanked, "")
        _remark_blanked(len(blanked), arguments.null_odds_threshold)
    if arguments.confidence:
        metrics |= _intervals(gold, predictions, arguments.metric_language)
    _remark(metrics, names, gold.version_2)
    if arguments.json:
        print(json.dumps(metrics | {name: listed for name, listed in names.items() if listed}))
    else:
        print("\n".join(metric_lines(metrics, gold.version_2)))
    return 0


def _best_spans(path: Path, predictions: dict[str, str]) -> tuple[dict[str, str] | None, str]:
    """The best spans of the evaluation that wrote the predictions, from the n-best lists beside them, and a remark.

    None and why, where there are none.
    """
    beside = path.with_name(NBEST_FILE)
    why = f"there is no {NBEST_FILE} of this evaluation beside {path}"
    if beside.is_file():
        try:
            spans = best_spans(read_nbest(str(beside)), predictions)
        except UserError as error:  # nobody has named this file
            spans, why = None, str(error)
        if spans is not None:
            return spans, ""
    if "" not in predictions.values():
        return None, ""
    return None, f"tuned_* and crossfit_* count empty predictions as they are, what was left out is unknown: {why}"


def _without(gold: GoldFile, predictions: dict[str, str]) -> dict[str, str]:
    """The predictions but those of questions without gold answers, which a remark counts."""
    ids = set(gold.without_gold).difference(question.example_id for question in gold.questions)
    if ids:
        counted = plural(len(ids), "question")
        print(f"{counted} without gold answers, not scored: {_listed(gold.without_gold)}", file=sys.stderr)
    return {example_id: text for example_id, text in predictions.items() if example_id not in ids}


def _explain(arguments: argparse.Namespace) -> int:
    if arguments.gold is not None:
        raise UserError(
            "--explain takes all its three files itself: qa-deepspeed score --explain A.json B.json GOLD.json"
        )
    a, b, gold = arguments.explain
    report = explain(read_gold(gold), read_predictions(a), read_predictions(b), arguments.metric_language)
    print(json.dumps(report) if arguments.json else "\n".join(explanation_lines(report)))
    return 0


def _intervals(gold: GoldFile, predictions: dict[str, str], language: str) -> dict[str, float]:
    """95% intervals of exact and f1, in percent, over the questions that the totals count."""
    questions = [q for q in gold.questions if q.example_id in predictions or not gold.version_2]
    answers = [(predictions.get(q.example_id), q.texts) for q in questions]
    scores = np.array(
        [(0, 0.0) if text is None else score_answer(text, golds, gold.version_2, language) for text, golds in answers]
    )
    paragraph = paragraph_numbers(gold, [q.example_id for q in questions])
    found: dict[str, float] = {}
    for column, name in enumerate(("exact", "f1")):
        interval = confidence_interval(scores[:, column], paragraph)
        found |= {f"{name}_low": 100 * interval.low, f"{name}_high": 100 * interval.high}
    return found


def metric_lines(metrics: dict[str, Any], version_2: bool) -> list[str]:
    """Metrics as a table for people."""
    width = max(map(len, metrics))
    rows = [f"rules of SQuAD {'v2.0' if version_2 else 'v1.1'}"]
    rows += [f"{name:<{width}}  {value:.4f}" for name, value in metrics.items() if isinstance(value, float)]
    rows += [f"{name:<{width}}  {value}" for name, value in metrics.items() if isinstance(value, int)]
    return rows


def _remark(metrics: dict[str, Any], names: dict[str, list[str]], version_2: bool) -> None:
    missing, extra = names["missing_ids"], names["extra_ids"]
    if missing and version_2:
        share = metrics["total"] / (metrics["total"] + len(missing))
        wrong = f"exact {metrics['exact'] * share:.4f}, f1 {metrics['f1'] * share:.4f}"
        print(
            f"{plural(len(missing), 'question')} without a prediction, left out of the totals, as in the official "
            f"script (counted as wrong: {wrong}): {_listed(missing)}",
            file=sys.stderr,
        )
    elif missing:
        print(
            f"{plural(len(missing), 'question')} without a prediction, which count as 0: {_listed(missing)}",
            file=sys.stderr,
        )
    if extra:
        print(
            f"{plural(len(extra), 'prediction')} without a question in the gold file: {_listed(extra)}", file=sys.stderr
        )


def _remark_blanked(count: int, threshold: float) -> None:
    if count:
        print(
            f"{plural(count, 'answer')} taken for none, as the null odds exceed {threshold:g}, as in the official "
            "script (--null_odds_threshold none takes the answers as they are)",
            file=sys.stderr,
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more (all with --json)" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
