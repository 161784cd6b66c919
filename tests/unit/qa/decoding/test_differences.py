"""Every difference between `exact` and `hf` decoding of the same logits has a named rule, and the rule is true."""

import numpy as np
import pytest

from qa_deepspeed.qa.decoding import hf as rules
from qa_deepspeed.qa.decoding.exact import Candidates, DecodeSettings, decode
from qa_deepspeed.qa.decoding.full_logits import FullLogits
from qa_deepspeed.qa.decoding.hf import decode_like_transformers
from qa_deepspeed.qa.decoding.predictions import Prediction, columns_of
from tests.unit.qa.decoding.test_hf import random_problem


def all_candidates(store, start_logits, end_logits, longest, width):
    """The candidates of every feature, by trying every span."""
    count = len(store.offsets)
    start, end = np.full((2, count, width), -1, np.int32)
    start_logit, end_logit = np.zeros((2, count, width), np.float32)
    for row, offsets in enumerate(store.offsets):
        tokens = [i for i, offset in enumerate(offsets) if offset]
        spans = [(s, e) for s in tokens for e in tokens if s <= e < s + longest]
        spans.sort(key=lambda span: (-(start_logits[row, span[0]] + end_logits[row, span[1]]), span))
        for i, (s, e) in enumerate(spans[:width]):
            start[row, i], end[row, i], start_logit[row, i], end_logit[row, i] = (
                s,
                e,
                start_logits[row, s],
                end_logits[row, e],
            )
    return Candidates(np.arange(count), start, end, start_logit, end_logit, start_logits[:, 0], end_logits[:, 0])


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("distinct", [None, 2])
def test_every_difference_has_a_named_rule(v2, distinct):
    store, (start, end) = random_problem(np.random.default_rng(5), 150, 40, distinct)
    how = DecodeSettings(n_best_size=3, max_answer_length=6, version_2_with_negative=v2)
    exact = list(decode(all_candidates(store, start, end, 6, 3), store, how))
    hf = list(decode_like_transformers(FullLogits(np.arange(len(start)), start, end), store, how))
    found = rules.list_differences(exact, hf, how)
    assert {d["example_id"] for d in found} == {
        a.example_id for a, b in zip(exact, hf, strict=True) if a.text != b.text
    }
    seen = {d["rule"] for d in found}
    assert {rules.MISSED_SPAN} <= seen <= {rules.MISSED_SPAN, rules.TIE, rules.WORD_EMPTY}
    assert (rules.TIE in seen) == bool(distinct)
    for difference in found:
        if difference["rule"] != rules.MISSED_SPAN:
            continue
        index = int(difference["example_id"][1:])
        _, _, start_logit, end_logit, _ = max(exact[index].nbest, key=lambda entry: (entry[0] != "", sum(entry[2:4])))
        rows = np.flatnonzero(store.example_index == index)
        beyond = [
            (start[row] > start_logit).sum() >= 3 or (end[row] > end_logit).sum() >= 3
            for row in rows
            if start_logit in start[row] and end_logit in end[row]
        ]
        assert distinct or all(beyond)


def prediction(text, score, odds=None, null=0.0, start=0):
    nbest = [(text, 0.5, score, 0.0, start)]
    if odds is not None:
        nbest.append(("", 0.5, null, 0.0, -1))
    return Prediction("q", "" if odds is not None and odds > 0 else text, columns_of(nbest), odds)


def test_rules_that_random_logits_do_not_reach():
    how = DecodeSettings(version_2_with_negative=True)
    assert rules.difference_rule(prediction("a", 1.0), prediction("a", 1.0), how) == rules.SAME
    assert rules.difference_rule(prediction("a", 1.0), prediction(" a", 1.0), how) == rules.BLANKS_TRIMMED
    assert rules.difference_rule(prediction("a", 1.0), prediction(" ", 2.0), how) == rules.BLANK_SPAN
    assert rules.difference_rule(prediction("", 0.0), prediction("empty", 0.0, start=-1), how) == rules.WORD_EMPTY
    other = prediction("a", 1.0, 2.0, null=3.0)
    assert rules.difference_rule(prediction("a", 1.0, -2.0, null=-1.0), other, how) == rules.OTHER_NULL
    near = prediction("a", 1.0, -1e-9, null=1.0), prediction("a", 1.0, 1e-9, null=1.0)
    assert rules.difference_rule(*near, how) == rules.ODDS_ROUNDED


def test_unexplained_difference_raises():
    how = DecodeSettings(version_2_with_negative=True)
    with pytest.raises(AssertionError, match="better span"):
        rules.difference_rule(prediction("a", 1.0), prediction("b", 2.0), how)
    with pytest.raises(AssertionError, match="different sides"):
        rules.difference_rule(prediction("a", 1.0, -2.0, null=1.0), prediction("a", 1.0, 2.0, null=1.0), how)
    with pytest.raises(AssertionError, match="exact found none"):
        rules.difference_rule(prediction("", 0.0), prediction("b", 2.0), how)
