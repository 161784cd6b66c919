"""Sizes that follow the model's width, by the rules of Transformers' DeepSpeed integration."""

import json
from pathlib import Path

import pytest

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import ds_config


@pytest.mark.parametrize("width", [128, 768])
def test_zero3_sizes_follow_the_hidden_size(tmp_path: Path, width: int) -> None:
    """`trainer_config_finalize`: width^2, 0.9 width^2, 10 width."""
    names = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 3, **dict.fromkeys(names, "auto")}}))
    options = RunOptions(deepspeed_config=str(config), given=frozenset({"deepspeed_config"}))
    zero = ds_config.finish(ds_config.resolve(options, 2, "cpu"), total_steps=10, hidden_size=width)[
        "zero_optimization"
    ]
    assert [zero[name] for name in names] == [width**2, int(0.9 * width**2), 10 * width]
