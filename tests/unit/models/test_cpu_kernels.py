"""Fast dropout and attention on CPUs: the distribution of masks, and results against plain torch."""

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, LlamaConfig, LlamaForQuestionAnswering

from qa_deepspeed.models.attention import cpu_attention
from qa_deepspeed.models.attention.cpu_attention import _rows, dropped_attention
from qa_deepspeed.models.attention.cpu_dropout import CpuDropout, KeepMasks
from qa_deepspeed.models.attention.row_attention import speed_up_on_cpu

SPANS = [(0, 0, 11), (1, 0, 8), (2, 3, 11)]


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9, 1e-3])
def test_masks_drop_independently_with_the_probability(probability):
    torch.manual_seed(3)
    dropped = KeepMasks(probability).draw(1000, 1000).numpy() == 0
    spread = math.sqrt(probability * (1 - probability) / dropped.size)
    assert abs(dropped.mean() - probability) < 5 * spread + 2**-17
    both = (dropped[:, 1:] & dropped[:, :-1]).mean(), (dropped[1:] & dropped[:-1]).mean()
    assert np.allclose(both, probability**2, atol=6 * spread)


def test_the_seed_determines_the_masks_and_calls_differ():
    def draw(seed, calls=1):
        torch.manual_seed(seed)
        return [KeepMasks(0.5).draw(7, 33) for _ in range(calls)]

    first, second = draw(1, calls=2)
    assert (first == draw(1)[0]).all() and (first != second).any() and (first != draw(2)[0]).any()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_dropout_scales_kept_values_and_their_gradient(kind):
    torch.manual_seed(0)
    layer, values = CpuDropout(0.25), torch.full((300, 999), 3.0, dtype=kind, requires_grad=True)
    output = layer(values)
    output.sum().backward()
    kept = output != 0
    assert output.dtype == kind and torch.allclose(output[kept].float(), torch.tensor(4.0), rtol=1e-2)
    assert torch.allclose(values.grad.float(), kept * (4.0 / 3.0), rtol=1e-2)
    assert torch.equal(layer.eval()(values), values)


def plain_attention(query, key, value, keep, scale, kept_scale):
    """Attention by the formula of the paper, over full rows; `keep` `[rows, heads, length, length]` is 0 at padding."""
    inside = torch.zeros(len(SPANS), query.shape[2], dtype=torch.bool)
    for row, begin, end in SPANS:
        inside[row, begin:end] = True
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~inside[:, None, None, :], -1e30)
    output = (torch.softmax(scores, -1) * keep * kept_scale) @ value
    return (output * inside[:, None, :, None]).transpose(1, 2)


@pytest.mark.parametrize("scores_at_once", [1, 200, 10**6])
def test_attention_with_dropout_equals_the_formula(scores_at_once, monkeypatch):
    monkeypatch.setattr(cpu_attention, "SCORES_AT_ONCE", scores_at_once)
    rows, heads, length, width = len(SPANS), 4, 11, 8
    torch.manual_seed(5)
    parts = [torch.randn(rows, length, heads, width).transpose(1, 2).requires_grad_() for _ in range(3)]
    above = torch.randn(rows, length, heads, width)
    torch.manual_seed(9)
    found = dropped_attention(*parts, SPANS, 0.3, 0.4)
    gradients = torch.autograd.grad(found, parts, above)

    torch.manual_seed(9)
    masks, keep = KeepMasks(0.4), torch.zeros(rows, heads, length, length)
    for row, tokens, together in _rows(SPANS, heads):
        size = tokens.stop - tokens.start
        for some in torch.arange(heads).split(together):
            keep[row, some, tokens, tokens] = masks.draw(len(some), size, size).float()
    expected = plain_attention(*parts, keep, 0.3, masks.scale)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, torch.autograd.grad(expected, parts, above), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def small(config_class, model_class, **extra):
    torch.manual_seed(1)
    config = config_class(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        **extra,
    )
    return model_class(config)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [(BertConfig, BertForQuestionAnswering), (LlamaConfig, LlamaForQuestionAnswering)])
@pytest.mark.parametrize("training", [False, True])
def test_a_model_gives_the_same_logits_and_gradients_without_dropout(side, kind, training):
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob") if training and kind[0] is BertConfig else ()
    no_dropout = dict.fromkeys(names, 0.0)  # in evaluation mode it must be off
    model, other = small(*kind, **no_dropout).train(training), small(*kind, **no_dropout).train(training)
    speed_up_on_cpu(other)
    inputs = {"input_ids": torch.randint(0, 50, (3, 12)), "attention_mask": torch.ones(3, 12, dtype=torch.long)}
    inputs["attention_mask"][1, slice(0, 4) if side == "left" else slice(8, 12)] = 0
    real = inputs["attention_mask"].bool()
    outputs = [each(**inputs) for each in (model, other)]
    for name in ("start_logits", "end_logits"):
        torch.testing.assert_close(outputs[1][name][real], outputs[0][name][real], rtol=1e-5, atol=1e-6)
    for output in outputs:
        (output.start_logits.sin() + output.end_logits.cos())[real].sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-5)


def test_a_model_trains_with_dropout_in_bfloat16_and_saves_its_original_config(tmp_path):
    model = small(BertConfig, BertForQuestionAnswering).to(torch.bfloat16).train()
    speed_up_on_cpu(model)
    assert any(isinstance(module, CpuDropout) for module in model.modules())
    output = model(input_ids=torch.randint(0, 50, (2, 9)), attention_mask=torch.ones(2, 9, dtype=torch.long))
    output.start_logits.float().square().mean().backward()
    gradient = model.bert.encoder.layer[0].attention.self.query.weight.grad
    assert gradient.isfinite().all() and gradient.any()
    model.save_pretrained(tmp_path)
    assert "rows" not in (tmp_path / "config.json").read_text()
