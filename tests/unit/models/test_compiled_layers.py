"""--torch_compile: what is missing is named; compiled layers give what the others give."""

from __future__ import annotations

import importlib.util
import shutil

import numpy as np
import pytest
import torch

from qa_deepspeed.engine.optim import decays
from qa_deepspeed.models.attention.row_attention import set_row_attention
from qa_deepspeed.models.compiled_layers import compile_layers, require_compiler
from qa_deepspeed.models.flat_parameters import flatten
from qa_deepspeed.models.heads import Objective, SpanHead
from qa_deepspeed.qa.features.batching import Packing, make_batch
from qa_deepspeed.utils.errors import UserError
from tests.unit.models.test_packing import layout_of, small_model, take


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="ZeRO 0 to 2"):
        require_compiler("cuda", 3)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="there is no no-such-compiler"):
        require_compiler("cpu", 2)
    monkeypatch.setenv("CXX", "sh")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_compiler("cpu", 2)
    with pytest.raises(UserError, match="pip install triton"):
        require_compiler("cuda", 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_losses_and_gradients_are_those_of_layers_that_are_not_compiled() -> None:
    """For several numbers of tokens, with flat parameters; a minute, most of it the compiler's."""
    model, head = small_model("bert"), SpanHead(Objective())
    set_row_attention(model)
    flatten(model, decays)
    model.train()
    layout = layout_of(model, packing=Packing(0))

    def step(rows: list[int]) -> tuple[float, torch.Tensor]:
        batch = make_batch(take, np.array(rows), layout)
        model.zero_grad()
        loss = head.losses(batch.by_row(model(**batch.inputs)), batch).sum()
        loss.backward()
        return float(loss), torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])

    batches = [[0, 1, 2], [3, 1], [2, 2, 0]]
    expected = [step(rows) for rows in batches]
    assert compile_layers(model) == 2
    for rows, (loss, gradient) in zip(batches, expected, strict=True):
        found, of_compiled = step(rows)
        assert found == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(of_compiled, gradient, rtol=1e-3, atol=1e-4)
