"""The optimizer's groups and numbers, beside those of Trainer."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForQuestionAnswering, Trainer

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.optim import default_optimizer, parameter_groups, works_elementwise
from qa_deepspeed.models.heads import BEAM_CLASSES
from qa_deepspeed.qa.features.families import FAMILIES

NEEDS = {
    "ministral": {"head_dim": 64},
    "nemotron": {"head_dim": 64, "num_key_value_heads": 8},
}
"""Settings without which a family's default config makes no model."""

WITHOUT_QA_CLASS = {"stablelm", "phi", "phi3", "gemma", "gemma2"}
"""Families for which Transformers has no question-answering class."""


def model_of(name: str, beam: bool = False) -> torch.nn.Module:
    """A question-answering model of a family, on the meta device."""
    config = AutoConfig.for_model(name, **NEEDS.get(name, {}))
    with torch.device("meta"):
        if beam:
            return getattr(transformers, BEAM_CLASSES[name])(config)
        return AutoModelForQuestionAnswering.from_config(config)


def decayed(model: torch.nn.Module) -> set[str]:
    """Names of the parameters with weight decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.1)
    assert sorted(id(parameter) for group in groups for parameter in group["params"]) == sorted(names)
    return {names[id(parameter)] for group in groups if group["weight_decay"] for parameter in group["params"]}


@pytest.mark.parametrize(
    ("name", "beam"),
    [(name, False) for name in FAMILIES if name not in WITHOUT_QA_CLASS] + [(name, True) for name in BEAM_CLASSES],
)
def test_the_groups_of_every_family_are_trainers(name: str, beam: bool) -> None:
    """The names, from `Trainer.get_decay_parameter_names`, which reads nothing of the Trainer."""
    model = model_of(name, beam)
    of_trainer = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    assert decayed(model) == {name for name, _ in model.named_parameters()}.intersection(of_trainer)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("xlnet", "transformer.layer.0.rel_attn.r_w_bias"),
        ("mpnet", "mpnet.encoder.relative_attention_bias.weight"),
        ("convbert", "convbert.encoder.layer.0.attention.self.key_conv_attn_layer.bias"),
    ],
)
def test_a_bias_of_more_than_one_dimension_does_not_decay(name: str, parameter: str) -> None:
    model = model_of(name)
    assert dict(model.named_parameters())[parameter].dim() > 1
    assert parameter not in decayed(model)


def test_families_without_a_class_are_named_here_only_as_long_as_they_have_none() -> None:
    for name in WITHOUT_QA_CLASS:
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            model_of(name)


def test_frozen_parameters_are_in_no_group() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    model[0].weight.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.0]
    assert sum(len(group["params"]) for group in groups) == 3


def test_the_default_optimizer_has_adams_own_betas() -> None:
    """Those of Kingma & Ba 2015, torch's and Trainer's defaults."""
    options = RunOptions(learning_rate=2e-5, adam_epsilon=1e-6, weight_decay=0.1)
    optimizer = default_optimizer(torch.nn.Linear(3, 4), options)
    for group, decay in zip(optimizer.param_groups, (0.1, 0.0), strict=True):
        assert (group["betas"], group["lr"], group["eps"]) == ((0.9, 0.999), 2e-5, 1e-6)
        assert group["weight_decay"] == decay and not group["amsgrad"]


NOT_DENSE = {"Optimizer", "LBFGS", "SparseAdam"}
TORCHS = [name for name in vars(torch.optim) if isinstance(getattr(torch.optim, name), type) and name not in NOT_DENSE]


@pytest.mark.parametrize("name", TORCHS)
def test_elementwise_optimizers_do_not_see_the_shapes_of_tensors(name: str) -> None:
    """Two matrices and one flat parameter that holds both: elementwise optimizers update them equally."""
    values = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    kind = getattr(torch.optim, name)
    parts, flat = [torch.nn.Parameter(one.clone()) for one in values], torch.nn.Parameter(values.flatten())
    try:
        optimizers = kind(parts, lr=0.01), kind([flat], lr=0.01)
    except ValueError:  # Muon takes matrices only
        assert not works_elementwise({"type": name})
        return
    for _ in range(3):
        for one, scale in zip(parts, (0.5, 4.0), strict=True):
            one.grad = scale * one.detach() + 0.1
        flat.grad = torch.cat([one.grad.flatten() for one in parts])  # type: ignore[union-attr]
        for optimizer in optimizers:
            optimizer.step()
    equal = torch.equal(torch.cat([one.detach().flatten() for one in parts]), flat.detach())
    assert works_elementwise({"type": name}) == equal


def test_the_default_optimizer_is_elementwise_and_lamb_is_not() -> None:
    assert works_elementwise(None) and works_elementwise({"type": "AdamW"}) and not works_elementwise({"type": "Lamb"})
