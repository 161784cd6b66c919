"""Saved activations, counted without weights, against the same forward pass with weights on the CPU."""

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, BertConfig

from qa_deepspeed.models.footprint import describe_parameters, footprint
from qa_deepspeed.models.layers import freeze
from qa_deepspeed.models.lora import LoraSettings, add_adapters
from tests.unit import small_tokenizers

SMALL = dict(hidden_size=64, num_attention_heads=4, intermediate_size=256, vocab_size=500)


def kept_on_cpu(model: torch.nn.Module, rows: int, length: int) -> int:
    """Bytes of the tensors that autograd saves, without parameters."""
    model.train()
    seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[torch.Tensor] = []
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        place = tensor.untyped_storage().data_ptr()
        if place not in seen:
            seen.add(place)
            kept.append(tensor)
            total += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=torch.zeros(rows, length, dtype=torch.long))
    return total


@pytest.mark.parametrize("layers", [1, 3])
def test_the_count_is_that_of_a_pass_with_weights(layers: int) -> None:
    config = BertConfig(num_hidden_layers=layers, **SMALL)
    counted = footprint(config, 3, 40, torch.float32)
    model = AutoModelForQuestionAnswering.from_config(config)
    assert counted.saved == kept_on_cpu(model, 3, 40)
    assert counted.counted
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert counted.largest_tensor == 512 * 64  # the positions


def test_checkpointing_keeps_one_layer_and_the_input_of_each() -> None:
    one, three = (footprint(BertConfig(num_hidden_layers=n, **SMALL), 3, 40, torch.float32) for n in (1, 3))
    layer_input = 3 * 40 * 64 * 4
    assert three.checkpointed - one.checkpointed == 2 * layer_input
    assert one.checkpointed - layer_input == one.saved
    assert three.attention == 3 * one.attention and three.checkpointed_attention == one.attention
    # Three matrices per layer: the softmax, the dropout mask, their product.
    assert one.attention == 3 * 4 * (3 * 4 * 40 * 40)


def test_half_precision_saves_about_half_except_in_attention() -> None:
    """Attention weights are float32 in both."""
    config = BertConfig(num_hidden_layers=2, **SMALL)
    full, half = (footprint(config, 3, 40, kind) for kind in (torch.float32, torch.bfloat16))
    assert half.attention == full.attention
    assert 0.45 < (half.saved - half.attention) / (full.saved - full.attention) < 0.6


def test_frozen_layers_are_not_trained_and_save_less() -> None:
    config = BertConfig(num_hidden_layers=3, **SMALL)
    whole, counted = (
        footprint(config, 3, 40, torch.float32),
        footprint(config, 3, 40, torch.float32, None, "embeddings,0"),
    )
    model = AutoModelForQuestionAnswering.from_config(config)
    freeze(model, "embeddings,0")
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    assert (counted.trained, counted.largest_trained) == (sum(trained), max(trained))
    assert counted.parameters == whole.parameters and sum(trained) < whole.trained
    assert counted.saved == kept_on_cpu(model, 3, 40) < whole.saved


def test_adapters_are_counted() -> None:
    """Frozen layers below the first adapter save nothing; those above save tensors that gradients pass through."""
    config = BertConfig(num_hidden_layers=3, **SMALL)
    settings = LoraSettings(rank=4, alpha=8, dropout=0.0, target_modules=("all-linear",))
    model = AutoModelForQuestionAnswering.from_config(config)
    add_adapters(model, settings, base="", seed=0)
    counted = footprint(config, 3, 40, torch.float32, settings)
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters())
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    assert (counted.trained, counted.largest_trained) == (sum(trained), max(trained)) and sum(trained) > 3 * 6 * 4 * 128
    assert counted.largest_tensor == 512 * 64
    assert counted.saved == kept_on_cpu(model, 3, 40)
    widths = 5 * SMALL["hidden_size"] + SMALL["intermediate_size"]  # outputs of a layer's six linear modules
    assert counted.adapted == 3 * (3 * 40) * widths * 4
    assert footprint(config, 3, 40, torch.float32).adapted == 0
    assert describe_parameters(counted) == f"{counted.parameters:,} parameters, {sum(trained):,} of them trained"


@pytest.mark.parametrize("name", ["bert", "distilbert", "electra", "albert", "bart", "longformer", "deberta"])
def test_every_family_has_a_figure_in_the_same_range(name: str) -> None:
    """Per row, token, layer and unit of width: about 34 bytes in half precision by the published formula, twice that
    in float32; the estimate stands in where the pass looks at values."""
    config = small_tokenizers.config(name)
    found = footprint(config, 2, 64, torch.float32)
    layers = config.num_hidden_layers + (getattr(config, "decoder_layers", None) or 0)
    assert found.counted == (name not in ("bart", "longformer", "deberta"))
    assert 40 < (found.saved - found.attention) / (2 * 64 * config.hidden_size * layers) < 130
