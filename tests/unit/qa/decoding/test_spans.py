"""The best spans against brute force, and the loss against its definition."""

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_deepspeed.qa.decoding.candidates import BestSpans, candidate_columns
from qa_deepspeed.qa.decoding.spans import best_spans, marginal_loss, span_loss


def brute_force(start: list[float], end: list[float], begin: int, stop: int, count: int, max_length: int) -> list:
    """All valid spans of a row, sorted by score, then start, then end; float32 sums as on the device."""
    spans = [
        (float(np.float32(start[s]) + np.float32(end[e])), s, e)
        for s in range(begin, stop)
        for e in range(s, min(stop, s + max_length))
    ]
    return sorted(spans, key=lambda span: (-span[0], span[1], span[2]))[:count]


def band_search(start_logits, end_logits, first_start, stop_start, context_end, count, max_length):
    """The result of `best_spans` in one stage: score every valid span, then sort stably."""
    rows, length = start_logits.shape
    width = min(max_length, length)
    starts = start_logits.float()
    ends = torch.nn.functional.pad(end_logits.float(), (0, width - 1), value=float("-inf"))
    band = starts.unsqueeze(2) + ends.unfold(1, width, 1)
    start, offset = torch.arange(length).view(1, -1, 1), torch.arange(width)
    valid = (start >= first_start.view(-1, 1, 1)) & (start < stop_start.view(-1, 1, 1))
    valid = valid & (start + offset < context_end.view(-1, 1, 1))
    scores = band.masked_fill(~valid, float("-inf")).view(rows, -1)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    found = scores.gather(1, order) > float("-inf")
    start = order // width
    end = (start + order % width).clamp(max=length - 1)
    logits = (starts.gather(1, start), end_logits.float().gather(1, end))
    return *(place.masked_fill(~found, -1) for place in (start, end)), *(x.masked_fill(~found, 0) for x in logits)


def random_rows(data: st.DataObject, values: list[float], length: int, rows: int) -> torch.Tensor:
    row = st.lists(st.sampled_from(values), min_size=length, max_size=length)
    return torch.tensor([data.draw(row) for _ in range(rows)])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_two_stages_equal_the_band_search(data: st.DataObject) -> None:
    """Few distinct values for many ties; -0.0 ties with 0.0, sums are rounded, -inf is no span."""
    length, rows = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
    values = [-2.5, -1.0, -0.0, 0.0, 0.5, 1.0, 1e8, 3.25, float("-inf")]
    if data.draw(st.booleans()):
        values = [*values, float("nan"), -float("nan")]
    start, end = (random_rows(data, values, length, rows) for _ in range(2))
    place = st.lists(st.integers(0, length), min_size=rows, max_size=rows).map(torch.tensor)
    first, stop, context_end = data.draw(place), data.draw(place), data.draw(place)
    count, max_length = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 45))
    arguments = (start, end, first, torch.minimum(stop, context_end), context_end, count, max_length)
    for found, expected in zip(best_spans(*arguments), band_search(*arguments), strict=True):
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype


def test_two_stages_equal_the_band_search_at_real_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    for length, count, max_length in ((384, 20, 30), (192, 1, 30), (384, 20, 1), (16, 20, 512)):
        start, end = torch.randn(2, 16, length, generator=generator).mul(3)
        start[8:], end[8:] = start[8:].mul(2).round().div(2), end[8:].mul(2).round().div(2)  # ties
        begin, stop = torch.full((16,), length // 16), torch.full((16,), length - 1)
        arguments = (start, end, begin, stop, stop, count, max_length)
        for found, expected in zip(best_spans(*arguments), band_search(*arguments), strict=True):
            assert torch.equal(found, expected)


def test_row_of_nan_has_no_span() -> None:
    start, end = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    limits = torch.zeros(3, dtype=torch.long), torch.full((3,), 10), torch.full((3,), 10)
    before = best_spans(start, end, *limits, 5, 4)
    start[1], end[1] = float("nan"), float("nan")
    for found, expected in zip(best_spans(start, end, *limits, 5, 4), before, strict=True):
        assert torch.equal(found[[0, 2]], expected[[0, 2]])
        assert (found[1] == (0 if found.is_floating_point() else -1)).all()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_best_spans_equal_brute_force(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 24))
    begin = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(begin, length))
    count, max_length = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 30))
    # few distinct values for many ties; 0.0 and -0.0 tie too
    values = st.lists(st.sampled_from([-2.5, -1.0, -0.0, 0.0, 0.5, 1.0, 3.25]), min_size=length, max_size=length)
    start, end = data.draw(values), data.draw(values)
    first = data.draw(st.integers(begin, stop))
    last = data.draw(st.integers(first, stop))
    places = (torch.tensor([position]) for position in (first, last, stop))
    result = best_spans(torch.tensor([start]), torch.tensor([end]), *places, count, max_length)
    found = [(s, e) for s, e in zip(result[0][0].tolist(), result[1][0].tolist(), strict=True) if s >= 0]
    everything = brute_force(start, end, begin, stop, 999, max_length)
    expected = [span for span in everything if first <= span[1] < last][:count]
    assert found == [(s, e) for _, s, e in expected]
    scores = (result[2] + result[3])[0][: len(found)].tolist()
    assert scores == [score for score, _, _ in expected]


def test_best_spans_equal_brute_force_in_float32_and_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    for kind in (torch.float32, torch.bfloat16):
        start = torch.randn(3, 384, generator=generator).mul(5).to(kind)
        end = torch.randn(3, 384, generator=generator).mul(5).to(kind)
        begin, stop = torch.tensor([12, 40, 0]), torch.tensor([383, 41, 384])
        result = best_spans(start, end, begin, stop, stop, 20, 30)
        for row in range(3):
            expected = brute_force(
                start[row].float().tolist(), end[row].float().tolist(), int(begin[row]), int(stop[row]), 20, 30
            )
            found = list(zip(result[0][row].tolist(), result[1][row].tolist(), strict=True))
            assert [pair for pair in found if pair[0] >= 0] == [(s, e) for _, s, e in expected]


def test_loss_does_not_depend_on_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 3, 10, generator=generator)
    position = torch.tensor([0, 4, 9])
    plain = span_loss(start, end, position, position, torch.ones(3, 10, dtype=torch.bool))
    by_hand = -(start.log_softmax(1)[range(3), position] + end.log_softmax(1)[range(3), position]) / 2
    torch.testing.assert_close(plain, by_hand)
    padded = torch.nn.functional.pad(start, (0, 6), value=3.0), torch.nn.functional.pad(end, (0, 6), value=-1.0)
    mask = torch.nn.functional.pad(torch.ones(3, 10, dtype=torch.bool), (0, 6))
    torch.testing.assert_close(span_loss(*padded, position, position, mask), plain)


def test_loss_is_float32_for_bfloat16_logits() -> None:
    logits = torch.randn(2, 5).bfloat16()
    all_possible = torch.ones(2, 5, dtype=torch.bool)
    loss = span_loss(logits, logits, torch.tensor([0, 1]), torch.tensor([2, 3]), all_possible)
    assert loss.dtype == torch.float32


def test_label_smoothing_equals_torch() -> None:
    torch.manual_seed(0)
    start_logits, end_logits = torch.randn(2, 5, 9)
    start, end = torch.randint(0, 9, (2, 5))
    all_possible = torch.ones(5, 9, dtype=torch.bool)
    expected = [
        torch.nn.functional.cross_entropy(logits, position, reduction="none", label_smoothing=0.2)
        for logits, position in ((start_logits, start), (end_logits, end))
    ]
    found = span_loss(start_logits, end_logits, start, end, all_possible, smoothing=0.2)
    torch.testing.assert_close(found, sum(expected) / 2)


def test_marginal_loss_sums_over_all_gold_spans() -> None:
    torch.manual_seed(0)
    start_logits, end_logits = torch.randn(2, 2, 6, requires_grad=True)
    possible = torch.tensor([[1, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    golds = [[(2, 3), (4, 4), (2, 5)], [(0, 0)]]
    starts = torch.tensor([[2, 4, 2], [0, -1, -1]])
    ends = torch.tensor([[3, 4, 5], [0, -1, -1]])
    found = marginal_loss(start_logits, end_logits, starts, ends, possible)
    for row, spans in enumerate(golds):
        both = [
            torch.softmax(logits[row].masked_fill(~possible[row], -1e9), 0) for logits in (start_logits, end_logits)
        ]
        probability = sum(both[0][first] * both[1][last] for first, last in spans)
        torch.testing.assert_close(found[row], -probability.log() / 2)
    for gradient in torch.autograd.grad(found.sum(), (start_logits, end_logits)):
        assert gradient.isfinite().all() and gradient.any()


def test_spans_that_a_row_lacks_are_minus_one() -> None:
    """In start and end alike, so that no text is taken for them."""
    numbers = torch.tensor([[3, 4]])
    found = BestSpans(numbers, numbers + 1, numbers.float(), numbers.float(), torch.zeros(1), torch.zeros(1))
    batch = SimpleNamespace(shift=torch.tensor([2]), feature_id=np.array([7]))
    columns = candidate_columns(batch, found, 4)  # type: ignore[arg-type]
    assert columns["start"].tolist() == [[1, 2, -1, -1]] and columns["end"].tolist() == [[2, 3, -1, -1]]
    assert columns["start_logit"].tolist() == [[3.0, 4.0, 0.0, 0.0]]
