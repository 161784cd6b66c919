"""What tests of several files need put back."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def threads_put_back() -> Iterator[None]:
    """The test may say how many threads torch has."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
