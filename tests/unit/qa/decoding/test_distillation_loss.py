"""The loss against a teacher's softened probabilities, written out from its definition, for padded and packed rows."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.heads import CLASSIC, Objective, SpanHead
from qa_deepspeed.qa.decoding.spans import answer_logits, answer_positions, distillation_loss, span_loss
from qa_deepspeed.qa.features.batching import Batch, Layout, Packing, make_batch
from tests.unit.qa.features.test_batching import rows_of

LENGTHS = [6, 11, 9]


def soft_rows() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A teacher's probabilities of each row of `LENGTHS`: the null position, then the context from position 2 on."""
    random = np.random.default_rng(5)
    return tuple(  # type: ignore[return-value]
        [random.dirichlet(np.ones(length - 1)).astype(np.float32) for length in LENGTHS] for _ in range(2)
    )


def batch_of(layout: Layout) -> Batch:
    start, end = (np.concatenate(rows) for rows in soft_rows())
    rows = dataclasses.replace(rows_of(LENGTHS), soft_start=start, soft_end=end)
    return make_batch(lambda _: rows, np.arange(3), layout)


def layout(side: str = "right", packing: Packing | None = None) -> Layout:
    return Layout(pad_token_id=9, pad_type_id=0, padding_side=side, columns=frozenset(), packing=packing)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_the_loss_is_its_definition(side: str, temperature: float) -> None:
    """T² times the mean of both cross-entropies, over null position and context alone; in float64, row by row."""
    batch = batch_of(layout(side))
    generator = torch.Generator().manual_seed(1)
    start_logits, end_logits = torch.randn(2, 3, 16, generator=generator) * 4
    outputs = SimpleNamespace(start_logits=start_logits, end_logits=end_logits)
    found = SpanHead(Objective(teacher_weight=0.9, temperature=temperature)).losses(outputs, batch)
    plain = SpanHead().losses(outputs, batch)
    for row, length in enumerate(LENGTHS):
        shift = int(batch.shift[row])
        places = [shift, *range(shift + 2, shift + length)]
        soft = 0.0
        for logits, of_teacher in zip((start_logits, end_logits), soft_rows(), strict=True):
            log_p = np.log(softmax(logits[row, places].double().numpy() / temperature))
            soft -= float(of_teacher[row].astype(np.float64) @ log_p) / 2
        expected = 0.1 * float(plain[row]) + 0.9 * temperature**2 * soft
        assert float(found[row]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("row_length", [None, 24])
def test_packed_rows_have_the_loss_of_padded_ones(row_length: int | None) -> None:
    """Also in the fixed shapes of CUDA graphs."""
    packing = Packing(0, token_multiple=8, row_length=row_length)
    padded, packed = batch_of(layout()), batch_of(layout(packing=packing))
    logits = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2)) * 3
    sequence = torch.zeros(2, 1, packed.computed_tokens)
    for row, (begin, length) in enumerate(zip(np.cumsum([0, *LENGTHS[:-1]]), LENGTHS, strict=True)):
        sequence[:, 0, begin : begin + length] = logits[:, row, :length]
    head = SpanHead(Objective(teacher_weight=0.5, temperature=2.0))
    expected = head.losses(SimpleNamespace(start_logits=logits[0], end_logits=logits[1]), padded)
    outputs = packed.by_row(SimpleNamespace(start_logits=sequence[0], end_logits=sequence[1]))
    assert outputs.start_logits.shape == (3, row_length or 16)
    torch.testing.assert_close(head.losses(outputs, packed), expected)


def test_a_teacher_that_is_certain_is_a_label() -> None:
    """At temperature 1; also for bfloat16 logits. The gradient is finite where no answer is possible."""
    begin, stop, null = torch.tensor([5, 1]), torch.tensor([30, 2]), torch.tensor([0, 39])
    start, end = torch.tensor([7, 39]), torch.tensor([9, 39])
    possible = answer_positions(begin, stop, null, 40)
    logits = (torch.randn(2, 2, 40, generator=torch.Generator().manual_seed(3)) * 5).bfloat16().requires_grad_()
    certain = [torch.nn.functional.one_hot(place, 40).float() for place in (start, end)]
    found = distillation_loss(logits[0], logits[1], certain[0], certain[1], possible, 1.0)
    assert torch.allclose(found, span_loss(logits[0], logits[1], start, end, possible), rtol=1e-6)
    found.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and (logits.grad[:, ~possible] == 0).all()


def test_weight_0_is_plain_training() -> None:
    """The same objective, whatever else is given."""
    teachers = {"teacher_model_name_or_path": "a,b", "distillation_temperature": 3.0}
    assert Objective.of(RunOptions(**teachers, distillation_weight=0.0)) == Objective.of(RunOptions()) == CLASSIC
    assert RunOptions(**teachers, distillation_weight=0.0).teachers == ()
    assert Objective.of(RunOptions(**teachers)) == Objective(False, 0.0, 0.5, 3.0)
    assert RunOptions(**teachers).teachers == ("a", "b")


def test_logits_of_the_answer_positions() -> None:
    """Null position first, wherever it is; less the maximum; far lower ones stay finite in half precision."""
    logits = torch.arange(20.0).reshape(2, 10)
    logits[1, 3] = -1e6
    found = answer_logits(logits, torch.tensor([4, 2]), torch.tensor([6, 5]), torch.tensor([0, 9]), 5)
    assert found.dtype == torch.float16
    lowest = float(np.finfo(np.float16).min)
    assert found.tolist() == [[-5, -1, 0, 0, 0], [0, -7, lowest, -5, 0]]
    logits[0, 5] = float("nan")
    found = answer_logits(logits, torch.tensor([4, 2]), torch.tensor([6, 5]), torch.tensor([0, 9]), 5)
    assert not found[0, :3].isfinite().all()
