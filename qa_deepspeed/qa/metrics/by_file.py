"""Scores of several files: of each, and their unweighted mean (macro) beside the scores of all questions (micro)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qa_deepspeed.qa.metrics.squad import Scorer

FILES = "files"
"""Key of the metrics of each file, by its name, among those of all questions."""

MACRO = ("exact", "f1")
"""Scores that have a mean over the files."""


CURVES = ("exact", "f1", "loss")
"""Metrics of a file that are shown among those of all questions."""


def flat_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics with those of `CURVES` of each file as `NAME/f1`, in place of `FILES`."""
    flat = {name: value for name, value in metrics.items() if name != FILES}
    for file, values in metrics.get(FILES, {}).items():
        flat |= {f"{file}/{name}": values[name] for name in CURVES if name in values}
    return flat


def scores_by_file(scorer: Scorer, files: Sequence[str], file_of_question: np.ndarray) -> dict[str, Any]:
    """Metrics under `FILES`, and macro_exact and macro_f1: the means over the files of which a question was scored.

    Args:
        scorer: has scored the questions of all files, and none without a prediction.
        files: their names.
        file_of_question: `[questions]` number of the file of each scored question.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(files):
        chosen = file_of_question == number
        found[name] = scorer.part(chosen).result() if chosen.any() else {"total": 0}
    scored = [metrics for metrics in found.values() if metrics["total"]]
    macro = {f"macro_{name}": sum(metrics[name] for metrics in scored) / len(scored) for name in MACRO if scored}
    return {**macro, FILES: found}
