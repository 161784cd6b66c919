"""Packed rows give what padded rows give: logits, losses of rows, gradients, for every family that claims to pack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.attention.row_attention import NAME, set_row_attention, speed_up_on_cpu
from qa_deepspeed.models.heads import Objective, SpanHead
from qa_deepspeed.models.packing import PACKED_FAMILIES, choose_packing, packing_of, rows_to_try
from qa_deepspeed.models.transformers_compat import attention_implementation
from qa_deepspeed.qa.features.batching import Batch, Layout, Packing, make_batch
from qa_deepspeed.qa.features.families import FAMILIES
from qa_deepspeed.qa.features.store import FeatureRows
from qa_deepspeed.utils.errors import UserError
from tests.unit.engine.test_optim import WITHOUT_QA_CLASS

SMALL: dict[str, Any] = {
    **{"vocab_size": 60, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "max_position_embeddings": 120},
    **{"hidden_size": 32, "embedding_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "num_layers": 2, "num_heads": 4},
    **{"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "dim": 32, "n_layers": 2, "n_heads": 4},
    **{"hidden_dim": 48, "n_embd": 32, "n_inner": 48, "n_positions": 120, "emb_dim": 32, "d_kv": 8, "d_ff": 48},
    **{"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "sliding_window": 12, "local_attention": 24},
    **{"rotary_dim": 4, "ffn_dim": 48, "word_embed_proj_dim": 32, "input_embedding_size": 16, "num_experts": 4},
    **{"output_embedding_size": 16, "moe_intermediate_size": 48, "num_local_experts": 4},
}
"""Settings of small models; each family takes those it knows."""

OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 12},
    "ministral": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen3_moe": {"num_experts_per_tok": 2},
    "squeezebert": {"embedding_size": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 12},
    "modernbert": {"sep_token_id": 3, "cls_token_id": 2},
}
LENGTHS = [33, 7, 70, 12]


def small_model(name: str, dropout: bool = False) -> Any:
    """A model of this family with random weights that move its logits, in evaluation mode."""
    known = AutoConfig.for_model(name).to_dict()
    settings = {key: value for key, value in SMALL.items() if key in known and known[key] is not None}
    settings |= {"pad_token_id": 1} | OTHER_SETTINGS.get(name, {})
    if not dropout:
        settings |= {key: 0.0 for key in known if key.endswith(("dropout", "dropout_prob", "pdrop"))}
    torch.manual_seed(3)
    model = AutoModelForQuestionAnswering.from_config(AutoConfig.for_model(name, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def take(rows: np.ndarray) -> FeatureRows:
    """Rows of random tokens; question and context are half of each, the answer is in the context."""
    lengths = np.array(LENGTHS)[rows]
    tokens = [np.random.default_rng(int(row)).integers(4, 60, LENGTHS[row]) for row in rows]
    half = (lengths // 2).astype(np.int32)
    types = np.concatenate([np.arange(length) >= length // 2 for length in lengths]).astype(np.int8)
    return FeatureRows(
        rows,
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate(tokens).astype(np.int32),
        types,
        half + 1,
        half + 2,
        np.zeros(len(rows), np.int32),
        half,
        (lengths - 1).astype(np.int32),
    )


def layout_of(model: Any, side: str = "right", packing: Packing | None = None) -> Layout:
    """The columns that a model of the family takes."""
    columns = {"input_ids", "attention_mask"}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        columns.add("token_type_ids")
    return Layout(1, 0, side, frozenset(columns), packing=packing)


def packed_and_padded(model: Any, packing: Packing) -> tuple[Batch, Batch]:
    rows = np.arange(len(LENGTHS))
    return make_batch(take, rows, layout_of(model, packing=packing)), make_batch(take, rows, layout_of(model))


@pytest.mark.parametrize("name", sorted(PACKED_FAMILIES))
def test_packed_rows_have_the_logits_losses_and_gradients_of_padded_ones(name: str) -> None:
    model = small_model(name)
    packing = packing_of(model, take, rows_to_try(np.array(LENGTHS)), layout_of(model))
    assert isinstance(packing, Packing), packing
    packed, padded = packed_and_padded(model, packing)
    set_row_attention(model)
    head = SpanHead(Objective())
    results = []
    for batch in (packed, padded):
        model.zero_grad()
        outputs = batch.by_row(model(**head.training_inputs(batch)))
        losses = head.losses(outputs, batch)
        losses.sum().backward()
        gradients = {key: one.grad.clone() for key, one in model.named_parameters() if one.grad is not None}
        spans = head.best(outputs, batch, (batch.context_begin, batch.context_end), 5, 8)
        results.append((losses.detach(), gradients, outputs, spans))
    (losses, gradients, outputs, spans), (of_padded, expected, padded_outputs, padded_spans) = results
    torch.testing.assert_close(losses, of_padded, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected.keys()
    largest = max(float(one.abs().max()) for one in expected.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-4 * largest, msg=key)
    for row, length in enumerate(LENGTHS):
        for one, other in zip((outputs.start_logits, outputs.end_logits), padded_outputs[:2], strict=False):
            torch.testing.assert_close(one[row, :length], other[row, :length], rtol=1e-3, atol=1e-4)
    assert torch.equal(spans.start, padded_spans.start) and torch.equal(spans.end, padded_spans.end)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - WITHOUT_QA_CLASS - PACKED_FAMILIES))
def test_other_families_are_tried_and_never_silently_wrong(name: str) -> None:
    """What packs here beyond the table is right too: its logits were compared."""
    model = small_model(name)
    before = attention_implementation(model)
    found = packing_of(model, take, rows_to_try(np.array(LENGTHS)), layout_of(model))
    assert isinstance(found, Packing) or (found and "\n" not in found)
    assert attention_implementation(model) == before


NOT_PACKED = ("deberta-v2", "xlnet", "xlm", "mpnet", "bart", "t5", "bloom")


@pytest.mark.parametrize("name", NOT_PACKED)
def test_models_that_work_otherwise_along_the_sequence_are_refused(name: str) -> None:
    model = small_model(name)
    assert isinstance(packing_of(model, take, rows_to_try(np.array(LENGTHS)), layout_of(model)), str)


def test_positions_that_continue_across_rows_are_noticed() -> None:
    """A model that ignores `position_ids` would give rows other logits in another place."""
    model = small_model("bert")
    plain = model.forward

    def without_positions(position_ids: Any = None, **inputs: Any) -> Any:
        return plain(**inputs)

    model.forward = without_positions
    reason = packing_of(model, take, rows_to_try(np.array(LENGTHS)), layout_of(model))
    assert isinstance(reason, str) and "differ" in reason


def test_attention_across_rows_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from qa_deepspeed.models.attention import row_attention

    def everything(bounds: list[int]) -> list[tuple[int, int]]:
        return [(bounds[0], bounds[-1])]

    model = small_model("llama")
    monkeypatch.setattr(row_attention, "pairwise", everything)
    assert isinstance(packing_of(model, take, rows_to_try(np.array(LENGTHS)), layout_of(model)), str)


def test_a_head_of_zeros_shows_nothing() -> None:
    model = small_model("bert")
    for parameter in model.qa_outputs.parameters():
        torch.nn.init.zeros_(parameter)
    reason = packing_of(model, take, rows_to_try(np.array(LENGTHS)), layout_of(model))
    assert reason == "its logits are all equal, so that nothing can be compared"


class Features:
    """What the choice needs of a store."""

    lengths = np.array(LENGTHS)
    take = staticmethod(take)


@pytest.mark.parametrize(
    ("name", "options", "before", "expected"),
    [
        ("bert", {}, None, Packing(0)),
        ("bert", {}, True, Packing(0)),
        ("bert", {}, False, None),
        ("bert", {"batch_layout": "packed"}, False, Packing(0)),
        ("bert", {"batch_layout": "padded"}, True, None),
        ("bert", {"attn_implementation": "eager"}, None, None),
        ("t5", {}, None, None),
    ],
)
def test_the_options_and_the_resumed_run_choose(
    name: str, options: dict[str, str], before: bool | None, expected: Packing | None
) -> None:
    model, features = small_model(name), Features()
    assert choose_packing(model, RunOptions(**options), features, layout_of(model), 2, before) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "before", "advice"),
    [
        ({"batch_layout": "packed"}, None, "leave --batch_layout packed out"),
        ({}, True, "--batch_layout padded resumes with padded ones"),
    ],
)
def test_packed_rows_that_are_asked_for_and_impossible_are_an_error(
    options: dict[str, str], before: bool | None, advice: str
) -> None:
    model = small_model("t5")
    with pytest.raises(UserError, match=advice):
        choose_packing(model, RunOptions(**options), Features(), layout_of(model), 2, before)  # type: ignore[arg-type]


@pytest.mark.parametrize("fill", [1, 64, 256])
def test_tokens_that_fill_the_sequence_change_nothing(fill: int) -> None:
    model = small_model("roberta")
    set_row_attention(model)
    packed, padded = packed_and_padded(model, Packing(2, fill))
    assert packed.computed_tokens % fill == 0 and packed.tokens == sum(LENGTHS)
    outputs, expected = packed.by_row(model(**packed.inputs)), model(**padded.inputs)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(
            outputs.start_logits[row, :length], expected.start_logits[row, :length], rtol=1e-4, atol=1e-5
        )


def test_dropout_in_packed_attention_is_the_kernels_for_each_row() -> None:
    """Mean over many masks near the output without dropout, and rows do not see each other."""
    model = small_model("bert", dropout=True)
    speed_up_on_cpu(model)
    assert attention_implementation(model) == NAME
    model.train()
    packed, _ = packed_and_padded(model, Packing(0))
    torch.manual_seed(1)
    first = packed.by_row(model(**packed.inputs)).start_logits
    changed = {**packed.inputs, "input_ids": packed.inputs["input_ids"].clone()}
    changed["input_ids"][0, : LENGTHS[0]] = 5  # the first row only
    torch.manual_seed(1)
    second = packed.by_row(model(**changed)).start_logits
    assert not torch.equal(first[0, : LENGTHS[0]], second[0, : LENGTHS[0]])
    for row, length in enumerate(LENGTHS[1:], 1):
        assert torch.equal(first[row, :length], second[row, :length])
