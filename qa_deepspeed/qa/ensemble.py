"""`qa-deepspeed ensemble`: one set of answers out of the n-best files of several runs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qa_deepspeed.errors import UserError
from qa_deepspeed.qa.predictions import NO_SPAN_NULL_ODDS, DecodeSettings, Prediction, write_predictions
from qa_deepspeed.qa.scoring_files import read_nbest

LEAST_PROBABILITY = 1e-30  # stands for "not listed" under the logarithm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ensemble`."""
    parser.add_argument("nbest", metavar="NBEST", nargs="+", help="nbest_predictions.json of each run, same questions")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="where the prediction files are written")
    parser.add_argument("--n_best_size", type=int, default=20, help="answers kept of each question")
    parser.add_argument(
        "--version_2_with_negative", action="store_true", help="the data has unanswerable questions: null odds decide"
    )
    parser.add_argument(
        "--null_score_diff_threshold", type=float, default=0.0, help="answer nothing where the null odds exceed this"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write predictions.json, nbest_predictions.json and, for v2 data, null_odds.json of the runs together.

    Raises:
        UserError: fewer than two files, a file that is no n-best file, or files of different questions.
    """
    if len(arguments.nbest) < 2:
        raise UserError("an ensemble takes the n-best files of two runs or more")
    if arguments.n_best_size < 1:
        raise UserError(f"--n_best_size is {arguments.n_best_size}; it must be 1 or more")
    runs = [read_nbest(path) for path in arguments.nbest]
    for path, one in zip(arguments.nbest[1:], runs[1:], strict=True):
        different = runs[0].keys() ^ one.keys()
        if different:
            raise UserError(
                f"{path}: its questions are not those of {arguments.nbest[0]} ({len(different)} are in one only, "
                f"such as {min(different)}); give n-best files of one data set"
            )
    settings = DecodeSettings(
        n_best_size=arguments.n_best_size,
        version_2_with_negative=arguments.version_2_with_negative,
        null_score_diff_threshold=arguments.null_score_diff_threshold,
    )
    written = write_predictions(combine(runs, settings), Path(arguments.output_dir), settings)
    print(f"{len(runs[0])} questions of {len(runs)} runs; written: {', '.join(map(str, written.values()))}")
    return 0


def combine(runs: list[dict[str, list[dict[str, Any]]]], settings: DecodeSettings) -> Iterator[Prediction]:
    """Average the runs' probabilities of each answer text, a text that a run does not list counting as 0.

    The null odds are the logarithm of the null answer's average over that of the best other answer; a tie of averages
    goes to the text that the earlier run lists first. Logits are averages over the runs that list the text.
    """
    for example_id in runs[0]:
        entries = _averaged([run[example_id] for run in runs])
        answers = [entry for entry in entries if entry["text"]][: settings.n_best_size]
        nulls = [entry for entry in entries if not entry["text"]]
        if not answers:
            odds = NO_SPAN_NULL_ODDS if settings.version_2_with_negative else None
            yield Prediction(example_id, "", nulls, odds)
            continue
        text, odds, kept = answers[0]["text"], None, answers
        if settings.version_2_with_negative:
            null = nulls[0]["probability"] if nulls else 0.0
            odds = math.log(max(null, LEAST_PROBABILITY)) - math.log(max(answers[0]["probability"], LEAST_PROBABILITY))
            text = "" if odds > settings.null_score_diff_threshold else text
            kept = sorted(answers + nulls, key=lambda entry: -entry["probability"])
        yield Prediction(example_id, text, kept, odds)


def _averaged(lists: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One entry for each text, the most probable first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entries in lists:
        best: dict[str, dict[str, Any]] = {}
        for entry in entries:  # the same text at two places: its probabilities add up, the better place stays
            if entry["text"] in best:
                known = best[entry["text"]]
                best[entry["text"]] = known | {"probability": known["probability"] + entry["probability"]}
            else:
                best[entry["text"]] = entry
        for text, entry in best.items():
            found.setdefault(text, []).append(entry)
    averaged = [
        {
            "text": text,
            "probability": math.fsum(entry["probability"] for entry in entries) / len(lists),
            "start_logit": math.fsum(entry["start_logit"] for entry in entries) / len(entries),
            "end_logit": math.fsum(entry["end_logit"] for entry in entries) / len(entries),
            "start": entries[0].get("start", -1),
        }
        for text, entries in found.items()
    ]
    return sorted(averaged, key=lambda entry: -entry["probability"])
