"""Layers by depth: found in every family, frozen, and trained with rates that fall."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from transformers import AlbertConfig, AutoConfig, AutoModelForQuestionAnswering, BertConfig

from qa_deepspeed.config.run_options import RunOptions, check_counts
from qa_deepspeed.engine.ds_config import resolve
from qa_deepspeed.engine.optim import check_layerwise, decays, described_groups, groups_of_run
from qa_deepspeed.models.flat_parameters import flat_names, flatten
from qa_deepspeed.models.layers import EMBEDDINGS, Layers, check_layers, freeze, named_places
from qa_deepspeed.qa.features.families import FAMILIES
from qa_deepspeed.utils.errors import UserError
from tests.unit.engine.test_optim import WITHOUT_QA_CLASS, model_of
from tests.unit.models.test_flat_parameters import SIZES, loss_of

SHARE_THEIR_LAYERS = {"albert"}
HEADS = ("qa_outputs", "qa_classifier", "classifier", "head", "start_logits", "end_logits", "answer_class")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WITHOUT_QA_CLASS])
def test_the_layers_of_every_family_are_those_of_its_config(name: str) -> None:
    model = model_of(name)
    layers, config = Layers.of(model), model.config
    if name == "funnel":
        expected = sum(config.block_sizes) + config.num_decoder_layers
    else:
        decoder = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None) or 0
        expected = 0 if name in SHARE_THEIR_LAYERS else config.num_hidden_layers + decoder
    assert layers.count == expected
    places = {tensor: layers.place(tensor) for tensor, _ in model.named_parameters()}
    assert set(places.values()) == set(range(EMBEDDINGS, layers.count + 1))
    assert (
        places[next(key for key, one in model.named_parameters() if one is model.get_input_embeddings().weight)] == -1
    )
    for tensor, place in places.items():
        if tensor.startswith(HEADS) or re.search(r"(final_layer_norm|final_norm|ln_f|transformer\.norm)\.", tensor):
            inside = re.search(r"\.(block|layers?|h)\.\d+\.", tensor)  # a layer may have such a norm too
            assert inside or place == layers.count, tensor


def model_of_layers(name: str) -> torch.nn.Module:
    """A small model with random weights, without dropout."""
    config = AutoConfig.for_model(name, vocab_size=50, pad_token_id=1, eos_token_id=2, **SIZES[name])
    config.decoder_start_token_id = 1
    torch.manual_seed(0)
    return AutoModelForQuestionAnswering.from_config(config).eval()


DEPTHS = {
    "bert": (3, r"encoder\.layer\.(\d)\.", r"embeddings\."),
    "xlnet": (2, r"transformer\.layer\.(\d)\.", r"word_embedding|mask_emb"),
    "gpt2": (2, r"\.h\.(\d)\.", r"wte|wpe"),
    "distilbert": (2, r"transformer\.layer\.(\d)\.", r"embeddings\."),
    "t5": (4, r"(?:encoder|decoder)\.block\.(\d)\.", r"shared"),
}
"""Layers of the models of `SIZES`, and patterns of names inside a layer and in the embeddings."""


def expected_steps(name: str, tensor: str) -> int:
    """How often the rate of the head is multiplied by the decay for a tensor, by its name."""
    count, layer, embeddings = DEPTHS[name]
    inside = re.search(layer, tensor)
    if inside:
        return count - int(inside[1]) - (2 if tensor.startswith("decoder.") else 0)
    return count + 1 if re.search(embeddings, tensor) else 0


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", DEPTHS)
def test_training_by_groups_is_that_of_one_optimizer_for_each_tensor(name: str, flat: bool) -> None:
    """To the bit; frozen tensors keep their values."""
    options = RunOptions(learning_rate=0.01, weight_decay=0.1, layerwise_lr_decay=0.5, freeze="embeddings,0")
    model = model_of_layers(name)
    before, reference = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    freeze(model, options.freeze)
    if flat:
        flatten(model, decays)
        assert flat_names(model)
    optimizer = torch.optim.AdamW(groups_of_run(model, options), lr=options.learning_rate, fused=True)
    one_by_one, frozen = [], set()
    count = DEPTHS[name][0]
    for tensor, parameter in reference.named_parameters():
        steps = expected_steps(name, tensor)
        if steps >= count:  # the embeddings and layer 0
            frozen.add(tensor)
            parameter.requires_grad_(False)
            continue
        decay = 0.1 if parameter.dim() > 1 and "bias" not in tensor else 0.0
        one_by_one.append(torch.optim.AdamW([parameter], lr=0.01 * 0.5**steps, weight_decay=decay, fused=True))
    for _ in range(3):
        for trained, steppers in ((model, [optimizer]), (reference, one_by_one)):
            trained.zero_grad()
            loss_of(trained).backward()
            for each in steppers:
                each.step()
    after, wanted = model.state_dict(), reference.state_dict()
    unused = {tensor for tensor, one in reference.named_parameters() if one.requires_grad and one.grad is None}
    for tensor, value in after.items():
        assert tensor in unused or torch.equal(value, wanted[tensor]), tensor
    assert all(torch.equal(after[tensor], before[tensor]) for tensor in frozen)
    assert len(unused) < 4 and not any(
        torch.equal(after[tensor], before[tensor])
        for tensor, _ in reference.named_parameters()
        if tensor not in unused | frozen
    )


def test_the_rate_that_a_run_logs_is_the_heads() -> None:
    options = RunOptions(learning_rate=0.01, layerwise_lr_decay=0.5)
    groups = groups_of_run(model_of_layers("bert"), options)
    assert groups[0]["lr"] == 0.01 and [group["lr"] for group in groups] == sorted(
        (g["lr"] for g in groups), reverse=True
    )
    assert "lr" not in groups_of_run(model_of_layers("bert"), RunOptions())[0]


def test_groups_in_words() -> None:
    model = model_of_layers("bert")
    freeze(model, "embeddings,1")
    lines = described_groups(model, RunOptions(learning_rate=0.01, layerwise_lr_decay=0.5, freeze="embeddings,1"))
    assert [line.split()[0] for line in lines] == ["head", "layer", "layer", "layer", "embeddings"]
    assert [line.rpartition(", ")[2] for line in lines] == [
        "learning rate 0.01",
        "learning rate 0.005",
        "frozen",
        "learning rate 0.00125",
        "frozen",
    ]
    counts = [int(re.search(r"([\d,]+) parameters", line)[1].replace(",", "")) for line in lines]  # type: ignore[index]
    assert sum(counts) == sum(parameter.numel() for parameter in model.parameters())


BERT = BertConfig(num_hidden_layers=3, hidden_size=16, num_attention_heads=2, intermediate_size=24, vocab_size=50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RunOptions(freeze="embeddings,0-3"), "freeze embeddings,0-3: the bert has the layers 0 to 2, not 3"),
        (RunOptions(freeze="pooler"), "'pooler' is neither embeddings, nor a layer like 3, nor layers like 0-5"),
        (RunOptions(freeze="2-1"), "'2-1' is neither"),
        (RunOptions(freeze="0", lora_rank=8), "with lora_rank all weights but the adapters and the head are frozen"),
    ],
)
def test_what_cannot_be_frozen_is_one_line(options: RunOptions, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_layers(options, BERT)


def test_layers_that_share_weights_have_no_rates_of_their_own() -> None:
    config = AlbertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=24, vocab_size=50)
    check_layers(RunOptions(freeze="embeddings"), config)
    for options in (RunOptions(layerwise_lr_decay=0.9), RunOptions(freeze="0-3")):
        with pytest.raises(UserError, match="an? albert has no layers with weights of their own"):
            check_layers(options, config)


def test_names_of_places() -> None:
    assert named_places(" 3-5, embeddings,4") == {EMBEDDINGS, 3, 4, 5} and named_places(None) == frozenset()


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.5])
def test_a_decay_is_more_than_0_and_at_most_1(decay: float) -> None:
    with pytest.raises(UserError, match="layerwise_lr_decay must be more than 0 and at most 1"):
        check_counts(RunOptions(layerwise_lr_decay=decay))


def test_a_schedule_of_deepspeeds_is_refused() -> None:
    options = RunOptions(layerwise_lr_decay=0.9, deepspeed_config="zero2")
    config = resolve(options, 1, "cpu").config
    check_layerwise(options, config)
    with pytest.raises(UserError, match="the scheduler of zero2 sets one learning rate for all layers"):
        check_layerwise(options, {**config, "scheduler": {"type": "WarmupLR", "params": {}}})
