"""Decoding the logits of a trained model on real questions: `exact` against `hf`, and `classic` against Transformers 4.

The models are those of the first and the last run under "Training" in tests/bench/README.md, which takes minutes:

    QA_DEEPSPEED_TRAINED_V1=runs/v1 QA_DEEPSPEED_TRAINED_V2=runs/v2 QA_DEEPSPEED_TRANSFORMERS_4=/somewhere/bin/python \
        pytest tests/unit/qa/decoding/test_trained.py -s

QA_DEEPSPEED_QUESTIONS=300 takes the first so many questions only.
"""

import collections
import os
from dataclasses import replace

import numpy as np
import pytest

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.facts import model_facts
from qa_deepspeed.models.heads import head_of
from qa_deepspeed.models.loading import load_model
from qa_deepspeed.qa.decoding.classic import classic_text, decode_classic
from qa_deepspeed.qa.decoding.exact import decode
from qa_deepspeed.qa.decoding.full_logits import FullLogits
from qa_deepspeed.qa.decoding.hf import decode_like_transformers, list_differences
from qa_deepspeed.qa.decoding.predictions import DecodeSettings
from qa_deepspeed.qa.features.families import model_columns
from qa_deepspeed.qa.metrics.squad import Gold, score
from qa_deepspeed.training.evaluation.evaluation_forward import gather_evaluation
from qa_deepspeed.training.features import load_features
from tests.paths import DATA, needs_real_data
from tests.unit.qa.decoding.test_classic import answers_of_transformers_4, needs_transformers_4
from tests.unit.training.test_evaluate import PlainReader

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(1800), needs_real_data]
TRAINED = {1: os.environ.get("QA_DEEPSPEED_TRAINED_V1", ""), 2: os.environ.get("QA_DEEPSPEED_TRAINED_V2", "")}


@pytest.fixture(scope="module", params=[1, 2])
def real(request, tmp_path_factory):
    """(candidates, logits, store, tokenizer, settings, options) of a trained model on all questions of a dev file."""
    version, folder = request.param, tmp_path_factory.mktemp("trained")
    if not TRAINED[version]:
        pytest.skip(f"set QA_DEEPSPEED_TRAINED_V{version} to the folder of a trained model")
    options = RunOptions(
        model_name_or_path=TRAINED[version],
        predict_file=str(DATA / f"en-v{version}-dev.json"),
        cache_dir=str(folder),
        version_2_with_negative=version == 2,
        gather="full",
        per_gpu_eval_batch_size=16,
        max_eval_examples=int(os.environ.get("QA_DEEPSPEED_QUESTIONS", 0)) or None,
    )
    facts = model_facts(options)
    store = load_features(options, "evaluate", facts)
    model, fresh = load_model(options, facts.config)
    assert not fresh
    reader = PlainReader(model)
    layout = facts.layout(model_columns(model, facts.config), 0)
    head = head_of(model, version == 2)
    found = gather_evaluation(reader.eval_forward, head, reader.device, store, layout, options, folder)
    settings = DecodeSettings(version_2_with_negative=version == 2)
    return found.candidates, found.logits, store, facts.tokenizer, settings, options


def test_every_difference_of_exact_and_hf_has_a_named_rule(real):
    candidates, logits, store, _, settings, _ = real
    exact = list(decode(candidates, store, settings))
    hf = list(decode_like_transformers(logits, store, settings))
    differences = list_differences(exact, hf, settings)
    rules = collections.Counter(one["rule"] for one in differences)
    golds = [Gold(e.example_id, tuple(a.text for a in e.answers)) for e in store.examples]
    v2 = settings.version_2_with_negative
    of_exact, of_hf = (
        score(golds, {p.example_id: p.text for p in each}, version_2_with_negative=v2)["f1"] for each in (exact, hf)
    )
    print(f"\n{len(differences)} of {len(exact)} questions: {dict(rules)}; F1 exact {of_exact:.2f}, hf {of_hf:.2f}")
    for one in differences:
        print(one)
    assert len(differences) <= 0.01 * len(exact)
    assert of_exact > 40, "the model was trained"


@needs_transformers_4
def test_classic_equals_transformers_4(real, tmp_path):
    _, logits, store, tokenizer, settings, options = real
    whole = FullLogits(logits.feature_id, *(np.maximum(x, -1e4) for x in (logits.start_logits, logits.end_logits)))
    settings = replace(settings, null_score_diff_threshold=-1.0)
    vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    lengths = {name: getattr(options, name) for name in ("max_seq_length", "doc_stride", "max_query_length")}
    theirs = answers_of_transformers_4(
        tmp_path, store, vocabulary, (whole.start_logits, whole.end_logits), settings, lengths
    )
    ours = {p.example_id: p.text for p in decode_classic(whole, store, settings, classic_text(tokenizer))}
    assert ours == theirs["answers"]
    print(f"\n{len(ours)} questions, every answer the same")
