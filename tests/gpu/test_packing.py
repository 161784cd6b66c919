"""Packed rows on a GPU: torch's kernels give the outputs, gradients and losses of padded rows, in every precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qa_deepspeed.models.attention.row_attention import set_row_attention
from qa_deepspeed.models.packing import TOLERANCES, packing_of, rows_to_try
from qa_deepspeed.qa.features.batching import Packing
from tests.distributed.launching import logged, losses, run_many
from tests.gpu.on_gpu import ON_GPU, SHORT_RUN, gpu_marks
from tests.unit.models.test_packing import LENGTHS, layout_of, packed_and_padded, small_model, take

pytestmark = gpu_marks

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAMILIES = ("bert", "roberta", "distilbert", "modernbert", "gpt2", "llama", "mistral", "qwen3")


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_those_of_padded_rows(name: str, precision: str) -> None:
    """The heads of these models are 8 wide, the narrowest that torch's flash attention takes."""
    model = small_model(name)
    packing = packing_of(model, take, rows_to_try(np.array(LENGTHS)), layout_of(model))
    assert isinstance(packing, Packing), packing
    device = torch.device("cuda", 0)
    set_row_attention(model)
    model.to(device, KINDS[precision])
    found, packing = {}, Packing(packing.first_position, 64)
    for kind, batch in zip(("packed", "padded"), packed_and_padded(model, packing), strict=True):
        model.zero_grad()
        on_device = batch.to(device)
        outputs = on_device.by_row(model(**on_device.inputs))
        rows = [outputs.start_logits[row, :length].float() for row, length in enumerate(LENGTHS)]
        torch.cat(rows).square().mean().backward()
        gradients = torch.cat([one.grad.float().flatten() for one in model.parameters() if one.grad is not None])
        found[kind] = torch.cat(rows).detach(), gradients
    (logits, gradients), (expected, of_padded) = found["packed"], found["padded"]
    tolerance = TOLERANCES[precision]
    assert float((logits - expected).abs().max()) <= tolerance * float(expected.max() - expected.min())
    assert float((gradients - of_padded).norm()) <= 5 * tolerance * float(of_padded.norm())


@pytest.fixture(scope="module")
def runs(base_options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of packed and padded rows in the same order, as PRECISION_LAYOUT."""
    folder: Path = tmp_path_factory.mktemp("packing")
    options = {**base_options, **SHORT_RUN, "deepspeed_config": "zero1", "group_by_length": False}
    flags: dict[str, dict[str, object]] = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}
    wanted = {
        f"{precision}_{layout}": {**options, **flag, "batch_layout": layout}
        for precision, flag in flags.items()
        for layout in ("packed", "padded")
    }
    run_many(1, wanted, folder, **ON_GPU)
    return folder


@pytest.mark.parametrize("precision", KINDS)
def test_losses_of_a_run_are_those_of_padded_rows(runs: Path, precision: str) -> None:
    packed, padded = (losses(runs / f"{precision}_{layout}") for layout in ("packed", "padded"))
    if precision == "fp32":
        np.testing.assert_allclose(packed, padded, rtol=1e-3)
    assert np.isfinite(packed).all() and abs(packed[-5:].mean() - padded[-5:].mean()) < 0.3
    assert max(logged(runs / f"{precision}_packed", "speed/padding")) < 0.2  # short rows, filled up to 64 tokens
