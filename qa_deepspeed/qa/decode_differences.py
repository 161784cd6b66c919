"""Why `exact` and `hf` decoding of the same logits answer a question differently: a named rule for each difference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from qa_deepspeed.qa.predictions import DecodeSettings, NBestEntry, Prediction

SAME = "same answer"
WORD_EMPTY = "hf found no span and said 'empty'"
BLANKS_TRIMMED = "exact trims blanks around a slice"
BLANK_SPAN = "hf's best span is blank, which exact does not take for an answer"
MISSED_SPAN = "hf pairs only the n_best_size best starts and ends of a window and missed a better span"
TIE = "spans of equal score: exact takes the first in the text, hf the one its sort puts first"
OTHER_NULL = "hf takes position 0 for the null answer where the model's null position is another"
ODDS_ROUNDED = "null odds next to the threshold: hf rounds them to float32"


def difference_rule(exact: Prediction, hf: Prediction, settings: DecodeSettings) -> str:
    """The rule by which the two differ, or `SAME`.

    Raises:
        AssertionError: no rule explains the difference; one of the decoders is wrong.
    """
    if exact.text == hf.text:
        return SAME
    best_hf = next((entry for entry in hf.nbest if entry[0]), None)
    if best_hf is None or (best_hf[0] == "empty" and best_hf[-1] < 0):
        return WORD_EMPTY
    if exact.text == hf.text.strip() and exact.text:
        return BLANKS_TRIMMED
    if not best_hf[0].strip():
        return BLANK_SPAN
    best_exact = next((entry for entry in exact.nbest if entry[0]), None)
    assert best_exact is not None, f"{exact.example_id}: hf found a span where exact found none"
    score_exact, score_hf = _score(best_exact), _score(best_hf)
    assert score_exact >= score_hf, f"{exact.example_id}: hf found a better span than exact"
    if score_exact > score_hf:
        return MISSED_SPAN
    if best_exact[0] != best_hf[0].strip():
        return TIE
    assert exact.null_odds is not None and hf.null_odds is not None, (
        f"{exact.example_id}: best spans equal, answers not"
    )
    if _null_score(exact) != _null_score(hf):
        return OTHER_NULL
    rounding = 2 * float(np.spacing(np.float32(max(map(abs, (exact.null_odds, _null_score(hf), score_hf))))))
    near = abs(exact.null_odds - settings.null_score_diff_threshold) <= rounding
    assert near, f"{exact.example_id}: equal spans and null scores on different sides of the threshold"
    return ODDS_ROUNDED


def list_differences(
    exact: Iterable[Prediction], hf: Iterable[Prediction], settings: DecodeSettings
) -> list[dict[str, Any]]:
    """Every question that the two answer differently: example_id, exact, hf (texts) and rule. Both in one order."""
    differences = []
    for one, other in zip(exact, hf, strict=True):
        assert one.example_id == other.example_id, "predictions are in different orders"
        rule = difference_rule(one, other, settings)
        if rule != SAME:
            differences.append({"example_id": one.example_id, "exact": one.text, "hf": other.text, "rule": rule})
    return differences


def _score(entry: NBestEntry) -> float:
    _, _, start_logit, end_logit, _ = entry
    return float(np.float32(start_logit) + np.float32(end_logit))


def _null_score(prediction: Prediction) -> float:
    return next((_score(entry) for entry in prediction.nbest if not entry[0]), float("nan"))
