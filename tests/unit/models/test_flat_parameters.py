"""Flat parameters: nothing but the number of parameters changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering

from qa_deepspeed.engine.optim import decays, parameter_groups
from qa_deepspeed.models.flat_parameters import LARGE_TABLE, flat_names, flatten
from qa_deepspeed.qa.features.families import FAMILIES
from tests.unit.engine.test_optim import WITHOUT_QA_CLASS, decayed, model_of


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WITHOUT_QA_CLASS])
def test_state_dicts_and_groups_of_every_family_stay_as_they_were(name: str) -> None:
    model = model_of(name).to("meta")  # some families make a few tensors on the CPU in any case
    before = {key: value.shape for key, value in model.state_dict().items()}
    of_decay, trained = decayed(model), dict(model.named_parameters())
    flatten(model, decays)
    assert {key: value.shape for key, value in model.state_dict().items()} == before
    flats = flat_names(model)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    found = {
        one
        for group in parameter_groups(model, 0.1)
        if group["weight_decay"]
        for parameter in group["params"]
        for one in flats.get(names[id(parameter)], [names[id(parameter)]])
    }
    assert found == of_decay
    inside = [one for tensors in flats.values() for one in tensors]
    assert len(set(inside)) == len(inside) and sorted(inside + [*(names.values() - flats.keys())]) == sorted(trained)
    assert len(names) < len(trained)


SIZES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24},
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "albert": {
        "embedding_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    },
    "t5": {"d_model": 16, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 24},
}


@pytest.fixture(params=SIZES)
def models(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A small model with random weights and its flat copy, without dropout."""
    config = AutoConfig.for_model(request.param, vocab_size=50, pad_token_id=1, eos_token_id=2, **SIZES[request.param])
    config.decoder_start_token_id = 1
    torch.manual_seed(0)
    plain = AutoModelForQuestionAnswering.from_config(config).eval()
    flat = copy.deepcopy(plain)
    flatten(flat, decays)
    return plain, flat


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 43).reshape(4, 10)
    outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    loss: torch.Tensor = (outputs.start_logits.logsumexp(1) - outputs.end_logits[:, 3]).sum()
    return loss


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by the names of the tensors, those of flat parameters cut."""
    found, flats = {}, flat_names(model)
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if name not in flats:
            found[name] = grad
            continue
        shapes = [torch.Size(shape) for shape in flats[name].values()]
        parts = grad.split([shape.numel() for shape in shapes])
        found |= {one: part.view(shape) for one, part, shape in zip(flats[name], parts, shapes, strict=True)}
    return found


def test_losses_and_gradients_are_equal_to_the_bit(models: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    plain, flat = models
    for _ in range(2):  # gradients add up over forward passes
        losses = [loss_of(model) for model in models]
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
    expected = gradients(plain)
    found = gradients(flat)
    assert found.keys() == expected.keys() and any(grad.any() for grad in expected.values())
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name


def test_state_dicts_round_trip(models: tuple[torch.nn.Module, torch.nn.Module], tmp_path: Path) -> None:
    plain, flat = models
    state = plain.state_dict()
    for name, value in flat.state_dict().items():
        assert torch.equal(value, state[name]), name
    changed = {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}
    assert not any(flat.load_state_dict(changed))
    plain.load_state_dict(changed)
    assert torch.equal(loss_of(flat), loss_of(plain))
    assert all(torch.equal(value, changed[name]) for name, value in flat.state_dict().items())
    copies = {name: value.clone() for name, value in flat.state_dict().items()}
    flat.save_pretrained(tmp_path, state_dict=copies)
    again = type(plain).from_pretrained(tmp_path)
    assert torch.equal(loss_of(again.eval()), loss_of(plain))


def test_casting_and_inference_mode(models: tuple[torch.nn.Module, torch.nn.Module]) -> None:
    plain, flat = (model.bfloat16() for model in models)
    with torch.inference_mode():
        assert torch.equal(loss_of(flat), loss_of(plain))
    loss_of(flat).backward()
    assert all(parameter.dtype == torch.bfloat16 for parameter in flat.parameters())


def test_a_large_block_stays() -> None:
    with torch.device("meta"):
        layers = [torch.nn.Sequential(torch.nn.Linear(4096, 5000), torch.nn.Linear(5000, 4096)) for _ in range(2)]
        model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})
    flatten(model, decays)
    assert {name.split(".", 2)[2] for name, _ in model.named_parameters()} == {
        "0.weight",
        "1.weight",
        "flat_not_decayed",
    }


def test_a_large_table_of_embeddings_stays() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(LARGE_TABLE // 4, 4), torch.nn.Embedding(8, 4))
    block = torch.nn.ModuleDict({"embeddings": model, "norm": torch.nn.LayerNorm(4)})
    flatten(block, decays)
    assert {name for name, _ in block.named_parameters()} == {
        "embeddings.0.weight",
        "embeddings.1.weight",
        "norm.flat_not_decayed",
    }


def test_frozen_and_shared_parameters_stay() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3), "c": torch.nn.LayerNorm(3)})
    model["b"].weight = model["a"].weight
    model["c"].bias.requires_grad_(False)
    flatten(model, decays)
    assert flat_names(model) == {} and len(list(model.parameters())) == 5
