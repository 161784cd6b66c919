"""`qa-deepspeed ensemble`: one set of answers out of the n-best files of several runs, scored with --gold."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from qa_deepspeed.cli.results.score import metric_lines
from qa_deepspeed.qa.decoding.predictions import (
    NBEST_FILE,
    NO_SPAN_NULL_ODDS,
    NULL_ODDS_FILE,
    PREDICTIONS_FILE,
    DecodeSettings,
    NBestEntry,
    Prediction,
    columns_of,
    write_predictions,
)
from qa_deepspeed.qa.metrics.normalization import METRIC_LANGUAGES
from qa_deepspeed.qa.metrics.prediction_files import read_gold, read_nbest, read_predictions
from qa_deepspeed.qa.metrics.squad import score
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import refuse_same_file
from qa_deepspeed.utils.units import plural

LEAST_PROBABILITY = 1e-30  # stands for "not listed" under the logarithm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ensemble`."""
    parser.add_argument(
        "nbest",
        metavar="RUN",
        nargs="+",
        help="each run's folder, or its nbest_predictions.json, of the same questions",
    )
    parser.add_argument("--gold", metavar="FILE", help="score the answers against this file")
    parser.add_argument(
        "--metric_language", choices=METRIC_LANGUAGES, default="en", help="with --gold: normalization (default en)"
    )
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
    paths = [_nbest_file(Path(given)) for given in arguments.nbest]
    for name in (PREDICTIONS_FILE, NBEST_FILE, NULL_ODDS_FILE):
        refuse_same_file(Path(arguments.output_dir) / name, paths)
    gold = read_gold(arguments.gold) if arguments.gold else None
    runs = [read_nbest(str(path)) for path in paths]
    for path, one in zip(paths[1:], runs[1:], strict=True):
        different = runs[0].keys() ^ one.keys()
        if different:
            raise UserError(
                f"{path}: its questions are not those of {paths[0]} ({len(different)} are in one only, "
                f"such as {min(different)}); give n-best files of one data set"
            )
    settings = DecodeSettings(
        n_best_size=arguments.n_best_size,
        version_2_with_negative=arguments.version_2_with_negative,
        null_score_diff_threshold=arguments.null_score_diff_threshold,
    )
    written = write_predictions(combine(runs, settings), Path(arguments.output_dir), settings)
    print(f"{plural(len(runs[0]), 'question')} of {len(runs)} runs; written: {', '.join(map(str, written.values()))}")
    if gold is not None:
        ids = {question.example_id for question in gold.questions}
        answers = {key: text for key, text in read_predictions(str(written[PREDICTIONS_FILE])).items() if key in ids}
        version_2 = gold.version_2
        metrics = score(gold.questions, answers, version_2_with_negative=version_2, language=arguments.metric_language)
        print("\n".join(metric_lines(metrics, version_2)))
    return 0


def _nbest_file(path: Path) -> Path:
    """The n-best file of a run's folder, or the file itself."""
    if path.is_dir() and not (path / NBEST_FILE).is_file():
        raise UserError(f"{path}: holds no {NBEST_FILE}: evaluate the run first (qa-deepspeed evaluate)")
    return path / NBEST_FILE if path.is_dir() else path


def combine(runs: list[dict[str, list[NBestEntry]]], settings: DecodeSettings) -> Iterator[Prediction]:
    """Average the runs' probabilities of each answer text, a text that a run does not list counting as 0.

    The null odds are the logarithm of the null answer's average over that of the best other answer; a tie of averages
    goes to the text that the earlier run lists first. Logits are averages over the runs that list the text.
    """
    for example_id in runs[0]:
        entries = _averaged([run[example_id] for run in runs])
        answers = [entry for entry in entries if entry[0]][: settings.n_best_size]
        nulls = [entry for entry in entries if not entry[0]]
        if not answers:
            odds = NO_SPAN_NULL_ODDS if settings.version_2_with_negative else None
            yield Prediction(example_id, "", columns_of(nulls), odds)
            continue
        (text, best, *_), odds, kept = answers[0], None, answers
        if settings.version_2_with_negative:
            null = nulls[0][1] if nulls else 0.0
            odds = math.log(max(null, LEAST_PROBABILITY)) - math.log(max(best, LEAST_PROBABILITY))
            text = "" if odds > settings.null_score_diff_threshold else text
            kept = sorted(answers + nulls, key=_improbability)
        yield Prediction(example_id, text, columns_of(kept), odds)


def _averaged(lists: list[list[NBestEntry]]) -> list[NBestEntry]:
    """One entry for each text, the most probable first."""
    found: dict[str, list[NBestEntry]] = {}
    for entries in lists:
        best: dict[str, NBestEntry] = {}
        for entry in entries:  # the same text at two places: its probabilities add up, the better place stays
            text, probability, start_logit, end_logit, start = entry
            if text in best:
                _, others, start_logit, end_logit, start = best[text]
                probability += others
            best[text] = (text, probability, start_logit, end_logit, start)
        for text, entry in best.items():
            found.setdefault(text, []).append(entry)
    averaged = []
    for text, entries in found.items():
        _, shares, start_logits, end_logits, starts = zip(*entries, strict=True)
        start_logit, end_logit = (math.fsum(logits) / len(entries) for logits in (start_logits, end_logits))
        averaged.append((text, math.fsum(shares) / len(lists), start_logit, end_logit, starts[0]))
    return sorted(averaged, key=_improbability)


def _improbability(entry: NBestEntry) -> float:
    _, probability, *_ = entry
    return -probability
