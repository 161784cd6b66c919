"""CUDA graphs on a GPU: runs equal those without graphs, dropout masks follow the seed, a kill changes nothing."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qa_deepspeed.engine.cuda_graphs import StepGraphs, fixed_shapes, use_own_stream
from qa_deepspeed.engine.optim import decays
from qa_deepspeed.models.attention.row_attention import set_row_attention
from qa_deepspeed.models.flat_parameters import flatten
from qa_deepspeed.models.heads import Objective, SpanHead
from qa_deepspeed.qa.features.batching import Packing, make_batch
from qa_deepspeed.training.loop import weighted_loss
from tests.distributed.launching import losses
from tests.gpu.on_gpu import SHORT_RUN, gpu_marks, train_at_once
from tests.unit.models.test_packing import layout_of, small_model, take

pytestmark = gpu_marks

HEAD = SpanHead(Objective())
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("precision", KINDS)
def test_gradients_and_dropout_masks_are_those_without_a_graph(precision: str) -> None:
    """A replay draws the masks of the seed before it; a second replay of the seed gives the same loss again."""
    device = torch.device("cuda", 0)
    model = small_model("bert", dropout=True)
    set_row_attention(model)
    flatten(model, decays)
    model.to(device, KINDS[precision]).train()
    before = torch.cuda.current_stream()
    use_own_stream()
    try:
        logged: list[str] = []
        graphs = StepGraphs(model, functools.partial(weighted_loss, HEAD), 1.0, False, logged.append)
        layout = layout_of(model, packing=fixed_shapes(Packing(0), 72))
        for rows in ([0, 1, 2, 3], [3, 2, 1, 0]):
            batch, found = make_batch(take, np.array(rows), layout).to(device), []
            for way in ("plain", "graph", "graph", "other seed"):
                model.zero_grad()
                torch.manual_seed(6 if way == "other seed" else 5)
                if way == "plain":
                    loss = weighted_loss(HEAD, lambda inputs: model(**inputs), batch) / 4
                else:
                    loss = graphs.loss(batch, 4)
                loss.backward()
                gradient = torch.cat([one.grad.float().flatten() for one in model.parameters() if one.grad is not None])
                found.append((float(loss), gradient.clone()))
            (expected, of_plain), (loss, gradient), (again, _), (other, _) = found
            assert logged == [] and graphs.count == 1
            assert loss == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 1e-2)
            assert again == pytest.approx(loss, rel=1e-6) and other != loss
            assert float((gradient - of_plain).norm()) <= 2e-2 * float(of_plain.norm())
    finally:
        torch.cuda.set_stream(before)


@pytest.fixture(scope="module")
def runs(base_options: dict[str, object], sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs as KIND/NAME; `resumed` continues `graphs` from its checkpoint."""
    folder: Path = tmp_path_factory.mktemp("graphs")
    options = {**base_options, **SHORT_RUN, "model_name_or_path": str(sample / "model"), "deepspeed_config": "zero1"}
    options |= {"logging_steps": 1, "save_steps": 30}
    launches = {}
    for kind, flag in (("fp32", {}), ("bf16", {"bf16": True})):
        checkpoint = str(folder / kind / "graphs" / "checkpoint-30")
        launches[kind] = {
            "graphs": {**options, **flag, "cuda_graphs": "true"},
            "plain": {**options, **flag, "cuda_graphs": "false"},
            "resumed": {**options, **flag, "cuda_graphs": "true", "resume_from_checkpoint": checkpoint},
            "accumulated": {**options, **flag, "cuda_graphs": "true", "gradient_accumulation_steps": 2},
        }
    train_at_once(launches, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_a_run_without_graphs(runs: Path, kind: str) -> None:
    found, expected = (losses(runs / kind / name) for name in ("graphs", "plain"))
    np.testing.assert_allclose(found[:5], expected[:5], rtol=1e-3 if kind == "fp32" else 3e-2)
    assert abs(found[-5:].mean() - expected[-5:].mean()) < 0.3
    assert np.isfinite(losses(runs / kind / "accumulated")).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_as_the_uninterrupted_one(runs: Path, kind: str) -> None:
    """To rounding: attention's backward pass adds in any order on a GPU."""
    expected, found = (load_file(runs / kind / name / "model.safetensors") for name in ("graphs", "resumed"))
    for weight, value in expected.items():
        np.testing.assert_allclose(found[weight].float(), value.float(), rtol=5e-2, atol=5e-3, err_msg=weight)
