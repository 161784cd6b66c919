"""Micro-batches as graphs: what they give DeepSpeed is what an ordinary forward and backward pass gives.

On a CPU the graph is a stand-in that repeats the work; tests/gpu captures.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.cuda_graphs import MOST_SHAPES, StepGraphs, Work, fixed_shapes, require_graphs, uses_graphs
from qa_deepspeed.engine.memory import ZeroSettings, estimate_memory
from qa_deepspeed.engine.optim import decays
from qa_deepspeed.models.attention.row_attention import set_row_attention
from qa_deepspeed.models.flat_parameters import flatten
from qa_deepspeed.models.heads import Objective, SpanHead
from qa_deepspeed.qa.features.batching import Batch, Packing, make_batch
from qa_deepspeed.training.loop import weighted_loss
from qa_deepspeed.utils.errors import UserError
from tests.unit.cli.test_plan import BILLION
from tests.unit.models.test_packing import layout_of, small_model, take

LONGEST = 72
HEAD = SpanHead(Objective())


def batches_of(model: Any, *rows: list[int]) -> list[Batch]:
    """Packed micro-batches of fixed shapes."""
    packing = dataclasses.replace(fixed_shapes(Packing(0), LONGEST), token_multiple=64)
    return [make_batch(take, np.array(one), layout_of(model, packing=packing)) for one in rows]


def graphs_of(model: Any, logged: list[str], capture: Any = lambda work: work, **settings: Any) -> StepGraphs:
    settings = {"factor": 1.0, "keep_gradients": False, "log": logged.append, **settings}
    return StepGraphs(model, functools.partial(weighted_loss, HEAD), capture=capture, **settings)


def model_in_training(flat: bool = False) -> Any:
    model = small_model("bert", dropout=True)
    set_row_attention(model)
    if flat:
        flatten(model, decays)
    return model.train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("flat", [False, True])
def test_losses_and_gradients_are_those_of_a_run_without_graphs(flat: bool) -> None:
    """Bit by bit, with dropout, for a new shape and for a known one, and with the frozen embeddings left out."""
    model, logged = model_in_training(flat), []
    model.bert.embeddings.requires_grad_(False)
    graphs = graphs_of(model, logged)
    for number, batch in enumerate(batches_of(model, [0, 1, 2], [1, 0, 3], [3, 3, 1], [2, 1, 0])):
        found = []
        for way in (lambda batch=batch: weighted_loss(HEAD, lambda inputs: model(**inputs), batch) / 7,
                    lambda batch=batch: graphs.loss(batch, 7)):  # fmt: skip
            model.zero_grad()
            torch.manual_seed(number)
            loss = way()
            loss.backward()
            found.append((loss.detach(), gradients(model)))
        (expected, of_loss), (loss, of_graph) = found
        assert torch.equal(loss, expected) and of_graph.keys() == of_loss.keys()
        assert all(torch.equal(of_graph[name], of_loss[name]) for name in of_loss), number
    assert graphs.count == 2 and logged == []  # of 128 and of 64 tokens


@pytest.mark.parametrize("keep", [True, False])
def test_gradients_are_summed_over_micro_batches_if_they_are_kept(keep: bool) -> None:
    model = model_in_training()
    graphs, expected = graphs_of(model, [], keep_gradients=keep), {}
    batches = batches_of(model, [0, 1, 2], [2, 1, 0])
    for batch in batches:
        torch.manual_seed(1)
        weighted_loss(HEAD, lambda inputs: model(**inputs), batch).backward()
    expected = gradients(model)
    model.zero_grad()
    for batch in batches:
        torch.manual_seed(1)
        graphs.loss(batch, 1).backward()
    equal = all(torch.equal(one, expected[name]) for name, one in gradients(model).items())
    assert equal == keep


def test_the_factor_is_part_of_the_gradients() -> None:
    model, (batch, *_) = model_in_training(), batches_of(model_in_training(), [0, 1])
    found = []
    for factor in (1.0, 4.0):
        model.zero_grad()
        torch.manual_seed(1)
        (graphs_of(model, [], factor=factor).loss(batch, 1) * factor).backward()
        found.append(gradients(model))
    assert all(torch.equal(4 * one, found[1][name]) for name, one in found[0].items())


def test_a_capture_that_fails_leaves_runs_without_graphs() -> None:
    def failing(work: Work) -> Work:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model, logged = model_in_training(), []
    graphs, batches = graphs_of(model, logged, failing), batches_of(model, [0, 1, 2], [1, 2, 3], [0])
    for batch in batches:
        torch.manual_seed(1)
        loss = graphs.loss(batch, 2)
        torch.manual_seed(1)
        assert torch.equal(loss, weighted_loss(HEAD, lambda inputs: model(**inputs), batch) / 2)
    assert logged == ["CUDA graphs: not used: operation not permitted when stream is capturing"] and not graphs.count


def test_a_graph_with_other_results_is_not_used() -> None:
    """As if a kernel's work were not captured."""

    def wrong(work: Work) -> Work:
        def replay() -> None:
            work()
            graphs._loss.mul_(1.5)

        return replay

    model, logged = model_in_training(), []
    graphs = graphs_of(model, logged, wrong)
    (batch,) = batches_of(model, [0, 1])
    torch.manual_seed(1)
    loss = graphs.loss(batch, 2)
    torch.manual_seed(1)
    assert torch.equal(loss, weighted_loss(HEAD, lambda inputs: model(**inputs), batch) / 2)
    assert len(logged) == 1 and "the loss is" in logged[0] and "without one" in logged[0]


def test_shapes_depend_on_tokens_rounded_up_only() -> None:
    model = small_model("bert")
    shapes = [[one.shape for one in batch.tensors()] for batch in batches_of(model, [0, 1], [1, 0], [3, 1], [2, 2])]
    assert shapes[0] == shapes[1] == shapes[2] != shapes[3]


def test_more_shapes_than_the_limit_run_without_a_graph() -> None:
    model, captured = model_in_training(), []
    graphs = graphs_of(model, [], lambda work: (captured.append(1), work)[1])
    for count in range(1, MOST_SHAPES + 4):
        (batch,) = batches_of(model, [1] * count)
        graphs.loss(batch, 1)
    assert len(captured) == graphs.count == MOST_SHAPES


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, True),
        ({"cuda_graphs": "false"}, False),
        ({"ranks": 2}, False),
        ({"ranks": 2, "cuda_graphs": "true"}, True),
        ({"device_type": "cpu"}, "no GPU"),
        ({"packed": False}, "padded"),
        ({"zero_stage": 3}, "ZeRO-3"),
        ({"precision": "fp16"}, "fp16"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
    ],
)
def test_when_graphs_are_used(settings: dict[str, Any], wanted: bool | str) -> None:
    """A reason against them is an error only where they are asked for."""
    given = {"ranks": 1, "device_type": "cuda", "packed": True, "zero_stage": 1, "precision": "bf16", **settings}
    names = {field.name for field in dataclasses.fields(RunOptions)}
    options = RunOptions(**{name: given[name] for name in given.keys() & names})

    def resolved(options: RunOptions) -> Any:
        return SimpleNamespace(options=options, zero_stage=given["zero_stage"], precision=given["precision"])

    require_graphs(resolved(options), given["device_type"], given["packed"])
    used = uses_graphs(resolved(options), given["device_type"], given["packed"], given["ranks"])
    assert used == (wanted is True)
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted):
            require_graphs(
                resolved(dataclasses.replace(options, cuda_graphs="true")), given["device_type"], given["packed"]
            )


def test_the_memory_plan_counts_the_gradients_of_graphs() -> None:
    model, zero = BILLION, ZeroSettings.of({"zero_optimization": {"stage": 1}})
    without, with_graphs = (estimate_memory(model, zero, 1, 2, 1, graphs) for graphs in (False, True))
    assert with_graphs.device() - without.device() == 2 * model.trained
