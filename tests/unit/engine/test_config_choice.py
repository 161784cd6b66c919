"""The config of a run that names none: the fastest shipped one that fits, and the one of before where it resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import config_choice
from qa_deepspeed.engine.config_choice import Machines, choose_config, estimate_configs, recommend
from qa_deepspeed.engine.ds_config import chooses_config, resolve
from qa_deepspeed.runs.resume import resumed_config

SMALL = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
LARGE = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", [None, "auto"])
def test_on_one_device_the_host_decides(name: str | None, bf16: bool) -> None:
    """bench_host: in half precision stage 1 takes a third of stage 0's operators; in float32 stage 0 takes least."""
    options = RunOptions(deepspeed_config=name, bf16=bf16, given=frozenset({"bf16"}) if bf16 else frozenset())
    assert chooses_config(options)
    chosen, why = choose_config(resolve(options, 1, "cpu"), SMALL, torch.device("cpu"), 1, 1)
    assert chosen == ("zero1" if bf16 else "zero0")
    assert f"take {chosen}" in why and "\n" not in why


def test_a_named_config_is_no_choice() -> None:
    assert not chooses_config(RunOptions(deepspeed_config="zero3"))


def test_little_memory_asks_for_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CPU ranks whose host holds the moments of AdamW once, not twice."""
    resolved = resolve(RunOptions(), 2, "cpu")
    needs = {
        row.config: row.need.host_of(2) for row in estimate_configs(RunOptions(), LARGE, Machines(1, 2, None, 1))[1]
    }
    between = (needs["zero0"] + min(needs["zero1"], needs["zero2"])) // 2
    assert between < needs["zero0"], "stage 0 needs most"
    monkeypatch.setattr(config_choice, "free_host_memory", lambda: int(between / config_choice.USABLE_SHARE))
    chosen, why = choose_config(resolved, LARGE, torch.device("cpu"), 2, 2)
    assert chosen in ("zero1", "zero2") and "zero0" in why


def test_where_nothing_fits_the_stand_in_stays_and_the_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_choice, "free_host_memory", lambda: 2**20)
    resolved = resolve(RunOptions(), 1, "cpu")
    chosen, why = choose_config(resolved, SMALL, torch.device("cpu"), 1, 1)
    assert chosen == resolved.name and "none fits" in why


def test_with_checkpointing_only_what_fits_with_it_counts() -> None:
    rows = estimate_configs(RunOptions(bf16=True), LARGE, Machines(1, 1, 10 * 2**30, 2**40))[1]
    best, why = recommend(rows, checkpointed=True)
    assert best is not None and best.fits_checkpointed and "with --gradient_checkpointing" in why


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"deepspeed_config": "zero1"}, "zero1"), ({"deepspeed_config": None}, "zero2"), ({}, "zero2")],
)
def test_a_resumed_run_keeps_its_config(options: dict[str, str | None], expected: str, tmp_path: Path) -> None:
    """Runs of before the choice had zero2 where the user named none."""
    record = {"status": "running", "identity": {"global_batch_size": 8}, "options": options}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert resumed_config(tmp_path, RunOptions()) == expected
    assert resumed_config(tmp_path, RunOptions(overwrite_output_dir=True)) is None
    assert resumed_config(tmp_path / "none", RunOptions()) is None
