"""Beam heads: which class is loaded, and decoded pairs against a brute-force search over the model's scores."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, BertConfig

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.facts import model_facts
from qa_deepspeed.models.heads import BeamHead, best_beam_spans, head_of
from qa_deepspeed.models.loading import load_model, model_from_config
from qa_deepspeed.qa.features.batching import make_batch
from qa_deepspeed.qa.features.families import model_columns
from qa_deepspeed.qa.metrics.prediction_files import read_nbest, read_null_odds, read_predictions
from qa_deepspeed.training.evaluation.evaluate import EvaluationData, evaluate
from qa_deepspeed.training.features import load_features
from qa_deepspeed.utils.errors import UserError
from tests.beam_models import save_model, write_questions
from tests.unit.training.test_evaluate import PlainReader

KINDS = ("xlnet", "xlm")


@pytest.fixture(scope="module", params=KINDS)
def setup(request, tmp_path_factory):
    """(model, data, options) of an untrained model on questions of one window or several."""
    folder = tmp_path_factory.mktemp(request.param)
    write_questions(folder / "questions.json")
    save_model(request.param, folder / "questions.json", folder / "model")
    options = RunOptions(
        model_name_or_path=str(folder / "model"),
        predict_file=str(folder / "questions.json"),
        version_2_with_negative=True,
        max_seq_length=48,
        max_query_length=24,
        doc_stride=8,
    )
    facts = model_facts(options)
    model, fresh = load_model(options, facts.config)
    assert not fresh
    layout = facts.layout(model_columns(model, facts.config), 0)
    return model.eval(), EvaluationData(load_features(options, "evaluate", facts), layout, facts.tokenizer), options


def brute_force(model, batch, max_length):
    """Of each row: {(start, end): log p(start) + log p(end | start)} of the beam, and the score for no answer."""
    head = BeamHead(model, True)
    inputs = head.inputs(batch)
    cls_index, p_mask = inputs.pop("cls_index"), inputs.pop("p_mask")
    parts = getattr(model, "qa_outputs", model)  # XLM keeps the three layers in one module
    with torch.no_grad():
        hidden = model.transformer(**inputs)[0]
        start = parts.start_logits(hidden, p_mask=p_mask).log_softmax(1)
        ends = [
            parts.end_logits(hidden, start_positions=torch.full((len(hidden),), s), p_mask=p_mask).log_softmax(1)
            for s in range(hidden.shape[1])
        ]
        summary = torch.einsum("blh,bl->bh", hidden, start.exp())
        null = parts.answer_class(hidden, start_states=summary, cls_index=cls_index)
    for row in range(len(hidden)):
        begin, stop = int(batch.context_begin[row]), int(batch.context_end[row])
        pairs = {}
        for s in start[row].topk(parts.start_n_top).indices.tolist():
            for e in ends[s][row].topk(parts.end_n_top).indices.tolist():
                if begin <= s <= e < min(stop, s + max_length):
                    pairs[s, e] = float(start[row, s] + ends[s][row, e])
        yield pairs, float(null[row])


def test_pairs_are_those_of_brute_force(setup):
    model, data, _ = setup
    head = head_of(model, True)
    assert isinstance(head, BeamHead)
    found_some = 0
    for first in range(0, len(data.store), 8):
        batch = make_batch(data.store.take, np.arange(first, min(first + 8, len(data.store))), data.layout)
        with torch.no_grad():
            outputs = model(**head.inputs(batch))
        found = head.best(outputs, batch, (batch.context_begin, batch.context_end), 25, 30)
        for row, (pairs, null) in enumerate(brute_force(model, batch, 30)):
            places = zip(found.start[row].tolist(), found.end[row].tolist(), strict=True)
            scores = (found.start_logit[row] + found.end_logit[row]).tolist()
            mine = {place: score for place, score in zip(places, scores, strict=True) if place[0] >= 0}
            assert mine == pytest.approx(pairs, abs=1e-4)
            assert scores[: len(mine)] == sorted(mine.values(), reverse=True)
            assert float(found.null_start_logit[row]) == pytest.approx(null, abs=1e-4)
            assert float(found.null_end_logit[row]) == 0.0
            found_some += len(mine)
    assert found_some > 2 * len(data.store)


def test_the_null_answer_is_applied_with_a_threshold(setup, tmp_path):
    """Null odds are the model's logit for "no answer", the lowest of the windows; its probability is their logistic."""
    model, data, options = setup
    batch = make_batch(data.store.take, np.arange(len(data.store)), data.layout)
    logits = np.array([null for _, null in brute_force(model, batch, 30)])
    lowest = [logits[data.store.example_index == i].min() for i in range(len(data.store.examples))]
    middle = float(np.median(lowest))
    changed = RunOptions(**{**options.to_dict(), "null_score_diff_threshold": middle})
    evaluate(PlainReader(model), data, changed, tmp_path)
    odds = read_null_odds(str(tmp_path / "null_odds.json"))
    lists = read_nbest(str(tmp_path / "nbest_predictions.json"))
    answers = read_predictions(str(tmp_path / "predictions.json"))
    decided = {example_id for example_id, entries in lists.items() if len(entries) > 1}
    for example_id, logit in zip(data.store.examples.ids, lowest, strict=True):
        if example_id in decided:
            assert odds[example_id] == pytest.approx(logit, abs=1e-4)
            null = next(share for text, share, *_ in lists[example_id] if not text)
            assert null == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-4)
            assert (answers[example_id] == "") == (odds[example_id] > middle)
    assert len(decided) > 16 and 0 < sum(answers[k] == "" for k in decided) < len(decided)


def test_ends_are_read_in_the_order_of_the_model():
    """[rows, end_n_top, start_n_top] flattened: the start varies fastest. Equal scores are ordered by position."""
    start, end = torch.tensor([[4, 2]]), torch.tensor([[5, 3, 6, 2, 4, 9]])
    start_probability, end_probability = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.5, 0.25, 0.25, 0.0, 0.1]])
    starts = torch.tensor([0]), torch.tensor([8])
    found = best_beam_spans(start, start_probability, end, end_probability, starts, torch.tensor([8]), 9, 30)
    assert list(zip(found[0][0].tolist(), found[1][0].tolist(), strict=True)) == [
        (2, 3),
        (4, 5),
        (2, 2),
        (4, 6),
        (-1, -1),
        (-1, -1),
    ]


def test_full_logits_of_a_beam_head_are_refused(setup, tmp_path):
    model, data, options = setup
    with pytest.raises(UserError, match="beam head has no logits"):
        evaluate(PlainReader(model), data, RunOptions(**{**options.to_dict(), "gather": "full"}), tmp_path)


@pytest.mark.parametrize(
    ("architectures", "asked", "name"),
    [
        (["XLNetForQuestionAnswering"], None, "XLNetForQuestionAnswering"),
        (["XLNetForQuestionAnsweringSimple"], None, "XLNetForQuestionAnsweringSimple"),
        (["XLNetLMHeadModel"], None, "XLNetForQuestionAnsweringSimple"),
        (["XLNetLMHeadModel"], "beam", "XLNetForQuestionAnswering"),
        (["XLNetForQuestionAnswering"], "span", "XLNetForQuestionAnsweringSimple"),
    ],
)
def test_the_checkpoint_or_the_option_selects_the_head(setup, architectures, asked, name):
    config = model_facts(setup[2]).config
    if config.model_type == "xlm":
        architectures = [one.replace("XLNetLMHead", "XLMWithLMHead").replace("XLNet", "XLM") for one in architectures]
        name = name.replace("XLNet", "XLM")
    config.architectures = architectures
    assert type(model_from_config(config, asked)).__name__ == name


def test_other_models_have_no_beam_head():
    tiny = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    assert isinstance(model_from_config(tiny), type(AutoModelForQuestionAnswering.from_config(tiny)))
    with pytest.raises(UserError, match="no beam head"):
        model_from_config(tiny, "beam")
