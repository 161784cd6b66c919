"""Names of types: those of precisions, of torch, and all that DeepSpeed reads in torch_autocast.dtype."""

import pytest
import torch

from qa_deepspeed.utils.dtypes import DTYPES, LONG_NAMES, dtype_named, weight_dtype


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16", "fp16", "half", "torch.float16", "float"])
def test_deepspeeds_names_are_read_as_deepspeed_reads_them(name: str) -> None:
    from deepspeed.runtime.config import DtypeEnum

    assert dtype_named(name) == DtypeEnum(name).value


def test_names_of_precisions_and_torch_are_of_the_same_types() -> None:
    assert list(DTYPES.values()) == list(LONG_NAMES.values())
    assert LONG_NAMES["bfloat16"] == torch.bfloat16
    assert [weight_dtype(name) for name in ("fp16", "torch_autocast")] == [torch.float16, torch.float32]
