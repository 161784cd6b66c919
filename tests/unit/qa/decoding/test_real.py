"""Decoding with a feature store of a made or a real file: gold spans go in as logits, gold answers must come out."""

import json

import numpy as np
import pytest

from qa_deepspeed.cli.data.sample import write_sample
from qa_deepspeed.qa.decoding.exact import Candidates, DecodeSettings, decode, write_predictions
from qa_deepspeed.qa.decoding.full_logits import FullLogits
from qa_deepspeed.qa.decoding.hf import decode_like_transformers
from qa_deepspeed.qa.metrics.prediction_files import read_gold, read_null_odds, read_predictions
from qa_deepspeed.qa.metrics.squad import Gold, Scorer, score
from tests.paths import DATA, MINILM, needs_real_data, needs_real_model

QUESTIONS = 300
MADE, REAL = "made", pytest.param("real", marks=[needs_real_data, needs_real_model])


@pytest.fixture(scope="module", params=[MADE, REAL])
def data(request, tmp_path_factory):
    """(path of a v2.0 gold file, folder of a model, settings of windows)."""
    from qa_deepspeed.qa.features.build import FeatureSettings

    if request.param == "real":
        return DATA / "en-v2-dev.json", MINILM, FeatureSettings(max_seq_length=160, doc_stride=64)
    folder = tmp_path_factory.mktemp("made") / "sample"
    write_sample(folder, 3, train_articles=60, dev_articles=60)
    return folder / "dev.json", folder / "model", FeatureSettings(max_seq_length=40, doc_stride=8, max_query_length=16)


@pytest.fixture(scope="module")
def store(data, tmp_path_factory):
    from transformers import AutoConfig, AutoTokenizer

    from qa_deepspeed.qa.cache.prepare import prepare_features
    from qa_deepspeed.qa.data.reading import DataSource
    from qa_deepspeed.qa.features.families import family_of

    path, model, settings = data
    tokenizer = AutoTokenizer.from_pretrained(model)
    source = DataSource((str(path),), "evaluate", True, max_examples=QUESTIONS)
    family = family_of(AutoConfig.from_pretrained(model), tokenizer)
    return prepare_features(source, tokenizer, family, settings, tmp_path_factory.mktemp("cache"))


def gold_logits(store):
    """High logits where a window holds the gold answer, high null logits where it does not."""
    rows = store.take(np.arange(len(store)))
    start, end = np.random.default_rng(0).normal(0, 1, (2, len(store), int(store.lengths.max()))).astype(np.float32)
    start[:, 0] = end[:, 0] = 0
    holds = rows.start != rows.null_position
    every = np.arange(len(store))
    start[every, rows.start] += 20
    end[every, rows.end] += 20
    assert holds.sum() > 100 and (~holds).sum() > 100
    return rows, start, end


def candidate_columns_of(rows, start, end, width=5):
    columns = [np.full((len(start), width), -1, np.int32) for _ in range(2)] + [
        np.zeros((len(start), width), np.float32) for _ in range(2)
    ]
    for row, (begin, stop) in enumerate(zip(rows.context_begin, rows.context_end, strict=True)):
        scores = start[row, begin:stop, None] + end[row, None, begin:stop]
        scores = np.where(np.tril(np.triu(np.ones_like(scores)), 29) > 0, scores, -np.inf)
        order = np.argsort(-scores, axis=None, kind="stable")[:width]
        first, last = np.unravel_index(order[np.isfinite(scores.ravel()[order])], scores.shape)
        for column, values in zip(
            columns, (begin + first, begin + last, start[row, begin + first], end[row, begin + last]), strict=True
        ):
            column[row, : len(values)] = values
    return Candidates(rows.feature_id, *columns, start[:, 0], end[:, 0])


def test_gold_spans_decode_to_gold_answers(data, store, tmp_path):
    rows, start, end = gold_logits(store)
    settings = DecodeSettings(n_best_size=5, version_2_with_negative=True)
    golds = [Gold(example.example_id, tuple(a.text for a in example.answers)) for example in store.examples]
    scorer = Scorer(version_2_with_negative=True)
    predictions = list(decode(candidate_columns_of(rows, start, end), store, settings))
    write_predictions(iter(predictions), tmp_path, settings)
    for gold, prediction in zip(golds, predictions, strict=True):
        scorer.add(gold, prediction.text, prediction.null_odds, prediction.best_span_text)
    metrics = scorer.result()
    assert metrics["NoAns_exact"] == 100.0
    assert metrics["HasAns_exact"] > 97 and metrics["best_exact"] > 98
    for example, prediction in zip(store.examples, predictions, strict=True):
        for text, *_, start in prediction.nbest:
            assert not text or example.context[start : start + len(text)] == text == text.strip()
    # the files, read back, score the same
    whole = read_gold(str(data[0]))
    first = whole.questions[:QUESTIONS]
    odds = read_null_odds(str(tmp_path / "null_odds.json"))
    from_files = score(first, read_predictions(str(tmp_path / "predictions.json")), odds)
    for name in ("exact", "f1", "HasAns_f1", "best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"):
        assert from_files[name] == metrics[name]


def test_hf_decoding_finds_the_same_answers(store):
    rows, start, end = gold_logits(store)
    settings = DecodeSettings(n_best_size=5, version_2_with_negative=True)
    exact = list(decode(candidate_columns_of(rows, start, end), store, settings))
    hf = list(decode_like_transformers(FullLogits(rows.feature_id, start, end), store, settings))
    assert [p.text for p in exact] == [p.text for p in hf]
    # the exact decoder's best span is at least as good, so its null odds are at most as high
    higher = np.array([one.null_odds for one in exact]) - np.array([other.null_odds for other in hf])
    assert (higher <= 1e-4).all() and (np.abs(higher) <= 1e-4).sum() > QUESTIONS / 2


def test_files_are_standard_json(store, tmp_path):
    rows, start, end = gold_logits(store)
    settings = DecodeSettings(n_best_size=5)
    write_predictions(decode(candidate_columns_of(rows, start, end), store, settings), tmp_path, settings)
    nbest = json.loads((tmp_path / "nbest_predictions.json").read_text(), parse_constant=pytest.fail)
    assert list(nbest) == store.examples.ids
    assert all(
        sum(entry["probability"] for entry in entries) == pytest.approx(1, abs=1e-5) for entries in nbest.values()
    )
