"""The window in which a token has most context, token by token as the classic script finds it."""

from __future__ import annotations

import numpy as np
import pytest

from qa_deepspeed.qa.decoding.max_context import best_window_ranges


def best_window(windows: list[tuple[int, int]], token: int) -> int:
    """`_check_is_max_context`: the first window (begin, length) with the highest score for a token."""
    best, best_score = -1, -1.0
    for number, (begin, length) in enumerate(windows):
        end = begin + length - 1
        if begin <= token <= end:
            score = min(token - begin, end - token) + 0.01 * length
            if best < 0 or score > best_score:
                best, best_score = number, score
    return best


def ranges_of(examples: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """What the function under test finds for the windows of some examples."""
    example = np.repeat(np.arange(len(examples)), [len(windows) for windows in examples])
    begin, length = np.array([window for windows in examples for window in windows]).T
    return list(zip(*(part.tolist() for part in best_window_ranges(example, begin, length)), strict=True))


@pytest.mark.parametrize("step", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("tokens", [5, 8, 9, 14, 23])
def test_tokens_go_to_the_window_with_most_context(step: int, tokens: int) -> None:
    """Also where two windows give a token the same: the first one has it."""
    starts = [begin for begin in range(0, tokens, step) if begin == 0 or begin + 8 - step < tokens]
    windows = [(begin, min(8, tokens - begin)) for begin in starts]
    found = ranges_of([windows, [(0, 4)], windows])
    assert found[len(windows)] == (0, 4)
    assert found[: len(windows)] == found[len(windows) + 1 :]
    for number, ((begin, _), (first, stop)) in enumerate(zip(windows, found, strict=False)):
        owned = [token for token in range(tokens) if best_window(windows, token) == number]
        assert list(range(begin + first, begin + stop)) == owned


def test_the_first_window_wins_a_tie() -> None:
    """Windows [0, 9) and [4, 13): token 6 has two tokens of context in each."""
    assert ranges_of([[(0, 9), (4, 9)]]) == [(0, 7), (3, 9)]


def test_of_equal_contexts_the_longer_window_wins() -> None:
    """Windows [0, 9) and [4, 16): token 6 has two tokens of context in each; 0.01 for each token decides."""
    windows = [(0, 9), (4, 12)]
    assert [best_window(windows, token) for token in range(16)] == [0] * 6 + [1] * 10
    assert ranges_of([windows]) == [(0, 6), (2, 12)]
