"""Predictions: the outcome of decoding, and the three files that hold it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from json.encoder import encode_basestring_ascii as quoted  # the json module's own string encoder, quotes included
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from qa_deepspeed.utils.files import replacing

PREDICTIONS_FILE = "predictions.json"
NBEST_FILE = "nbest_predictions.json"
NULL_ODDS_FILE = "null_odds.json"

NO_SPAN_NULL_ODDS = 1e6
"""The null odds of a question without any span (an empty context): finite, so that every JSON reader accepts it, and
far above any tuned threshold."""


@dataclass(frozen=True)
class DecodeSettings:
    """How candidates become answers."""

    n_best_size: int = 20
    max_answer_length: int = 30  # tokens
    version_2_with_negative: bool = False
    null_score_diff_threshold: float = 0.0  # the answer is "" where the null odds exceed this
    merge_duplicate_texts: bool = False  # of several spans with the same text only the best counts
    null_score_is_odds: bool = False  # null scores are already null odds (beam heads)


NBEST_FIELDS = ("text", "probability", "start_logit", "end_logit", "start")
NBestEntry = tuple[str, float, float, float, int]
"""The values of `NBEST_FIELDS`. `start` is the character of the context where the text begins. The null entry (text "")
has start -1 and, as in run_squad.py, both logits of the null position, from the window with the lowest sum. A beam
head, which has one score for "no answer", gives it as start_logit, with 0 as end_logit.
"""
NBestColumns = tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""An n-best list by columns, in the order of `NBEST_FIELDS`: a list of texts and arrays `[entries]`. One tuple per span
would take as long to build as the spans take to find.
"""


def columns_of(entries: Iterable[NBestEntry]) -> NBestColumns:
    """The columns of an n-best list that has at least one entry."""
    texts, *numbers = zip(*entries, strict=True)
    probabilities, start_logits, end_logits, starts = map(np.array, numbers)
    return list(texts), probabilities, start_logits, end_logits, starts


class Prediction(NamedTuple):
    """One question's outcome. Its n-best list is sorted best first and never empty.

    `null_odds` is the null score minus the best span's score (None for v1 data).
    """

    example_id: str
    text: str
    nbest_columns: NBestColumns
    null_odds: float | None

    @property
    def nbest(self) -> list[NBestEntry]:
        """The n-best list by entries, built at each call."""
        texts, *numbers = self.nbest_columns
        return list(zip(texts, *(column.tolist() for column in numbers), strict=True))

    @property
    def best_span_text(self) -> str:
        """The best span's text regardless of the null odds; "" if there is no span."""
        return next(filter(None, self.nbest_columns[0]), "")


def write_predictions(predictions: Iterable[Prediction], output_dir: Path, settings: DecodeSettings) -> dict[str, Path]:
    """Write predictions.json {id: text}, nbest_predictions.json {id: [entry, ...]} and, for v2 data, null_odds.json
    {id: number}, one question a line, while the predictions arrive; return the paths by file name.

    Each file gets its name only when all are complete. Answers and null odds round-trip exactly, the numbers of the
    n-best lists as float32.
    """
    names = [NBEST_FILE, PREDICTIONS_FILE]
    if settings.version_2_with_negative:
        names.insert(1, NULL_ODDS_FILE)
    else:
        (output_dir / NULL_ODDS_FILE).unlink(missing_ok=True)  # of an earlier evaluation, no longer valid
    output_dir.mkdir(parents=True, exist_ok=True)
    with _replaced_when_complete([output_dir / name for name in names]) as files:
        separator = "{\n"
        for prediction in predictions:
            key = f"{separator}{quoted(prediction.example_id)}: "
            separator = ",\n"
            files[NBEST_FILE].write(key + _nbest_json(prediction.nbest_columns))
            files[PREDICTIONS_FILE].write(key + quoted(prediction.text))
            if settings.version_2_with_negative:
                assert prediction.null_odds is not None, "v2 decoding gives null odds"
                files[NULL_ODDS_FILE].write(key + repr(prediction.null_odds))
        for file in files.values():
            file.write("{}\n" if separator == "{\n" else "\n}\n")
    return {name: output_dir / name for name in names}


def _nbest_json(columns: NBestColumns) -> str:
    # One format call for the whole list: formatting takes most of the time of writing.
    texts, *numbers = columns
    values = zip(map(quoted, texts), *(column.tolist() for column in numbers), strict=True)
    return _list_format(len(texts)) % tuple(chain.from_iterable(values))


@cache
def _list_format(entries: int) -> str:
    # Nine significant digits identify every float32; '#' forces a decimal point, so that readers see a float.
    formats = ("%s", "%#.9g", "%#.9g", "%#.9g", "%d")
    entry = f"{{{', '.join(f'{quoted(name)}: {one}' for name, one in zip(NBEST_FIELDS, formats, strict=True))}}}"
    return f"[{', '.join([entry] * entries)}]"


@contextmanager
def _replaced_when_complete(paths: list[Path]) -> Iterator[dict[str, TextIO]]:
    """Text files by name, written under temporary names and renamed at the end, in this order, or removed on error."""
    with ExitStack() as renames:
        # The stack leaves its contexts in reverse order, so the last path is entered first.
        temporary = {path.name: renames.enter_context(replacing(path)) for path in reversed(paths)}
        with ExitStack() as opened:
            yield {
                name: opened.enter_context(open(path, "w", encoding="ascii", newline="\n"))
                for name, path in temporary.items()
            }
