"""The secondary partition of ZeRO++ on two hosts of two ranks each, which are all this machine: zero3_zeropp without
quantized messages, which need GPUs. Equal losses, and the traffic and memory of the plan.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForQuestionAnswering, BertConfig

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import ds_config
from qa_deepspeed.engine.memory import MemoryEstimate, ZeroSettings, estimate_cpu_memory
from qa_deepspeed.models.footprint import footprint
from tests.distributed.launching import losses, run_as_hosts, run_many
from tests.distributed.memory import sent
from tests.paths import REPOSITORY

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]

HOSTS, RANKS_OF_HOST = 2, 2
RANKS = HOSTS * RANKS_OF_HOST
ROWS, LENGTH = 2, 64
STEPS = 10
MODEL = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)


def config(folder: Path, secondary: bool, **zero: object) -> str:
    """A file with zero3_zeropp's settings, or without its secondary partition, in which parameters are gathered for the
    backward pass again, as those of a model too large to stay: none is kept for it or fetched early."""
    found = ds_config.load("zero3_zeropp")
    section = found["zero_optimization"]
    for name in ("zero_quantized_weights", "zero_quantized_gradients"):
        del section[name]
    if not secondary:
        del section["zero_hpz_partition_size"]
    section |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    section |= {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10**6}
    path = folder / f"{'secondary' if secondary else 'zero3'}.json"
    path.write_text(json.dumps({**found, "zero_optimization": {**section, **zero}}))
    return str(path)


def train_on_hosts(runs: dict[str, dict[str, object]], folder: Path) -> None:
    listed = folder / "runs.json"
    listed.write_text(json.dumps(runs))
    for done in run_as_hosts(HOSTS, RANKS_OF_HOST, ["tests.distributed.worker", str(listed), str(folder)], REPOSITORY):
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def before_its_end(run: Path, copy: Path, checkpoint: str) -> None:
    """A copy of a finished run as it was after an earlier checkpoint."""
    shutil.copytree(run, copy)
    record = json.loads((run / "run.json").read_text())
    del record["json_checksum"]
    (copy / "run.json").write_text(json.dumps({**record, "status": "running"}))
    (copy / "model.safetensors").unlink()
    for path in copy.glob("checkpoint-*"):
        if path.name != checkpoint:
            shutil.rmtree(path)


def test_losses_and_answers_are_those_of_zero3(base_options: dict[str, object], tmp_path: Path) -> None:
    """Also after a resume, and with a checkpoint of one host, which has no secondary partition."""
    options = {**base_options, "max_steps": STEPS, "save_steps": STEPS // 2, "adam_epsilon": 1e-3, "do_eval": True}
    options |= {"per_gpu_train_batch_size": 2, "global_batch_size": 16}
    secondary = {**options, "deepspeed_config": config(tmp_path, secondary=True)}
    runs = {"zero3": {**options, "deepspeed_config": config(tmp_path, secondary=False)}, "secondary": secondary}
    train_on_hosts({**runs, "other_rate": {**secondary, "learning_rate": 1.3e-3}}, tmp_path)
    of = {name: losses(tmp_path / name) for name in ("zero3", "secondary", "other_rate")}
    assert len(of["zero3"]) == STEPS
    np.testing.assert_allclose(of["secondary"], of["zero3"], rtol=1e-6)
    assert np.abs(of["other_rate"] / of["zero3"] - 1).max() > 1e-3
    answers = [json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("zero3", "secondary")]
    assert answers[0] == answers[1]

    before_its_end(tmp_path / "secondary", tmp_path / "resumed", f"checkpoint-{STEPS // 2}")
    run_many(RANKS_OF_HOST, {"on_one_host": secondary}, tmp_path)
    before_its_end(tmp_path / "on_one_host", tmp_path / "carried", f"checkpoint-{STEPS // 2}")
    train_on_hosts({"resumed": secondary, "carried": secondary}, tmp_path)
    expected = load_file(tmp_path / "secondary/model.safetensors")
    for name, tolerance in (("resumed", 0.0), ("carried", 1e-4)):
        found = load_file(tmp_path / name / "model.safetensors")
        for weight, value in expected.items():
            np.testing.assert_allclose(found[weight], value, rtol=tolerance, atol=tolerance / 100, err_msg=weight)


def measure(folder: Path, secondary: bool) -> tuple[list[dict[str, Any]], MemoryEstimate]:
    """What each rank used and sent in a step, and the plan for it."""
    name = config(folder, secondary)
    options = {"deepspeed_config": name, "per_gpu_train_batch_size": ROWS, "max_seq_length": LENGTH}
    out = folder / Path(name).stem
    worker = ["tests.distributed.memory", str(folder / "model"), json.dumps(options), str(out)]
    for done in run_as_hosts(HOSTS, RANKS_OF_HOST, worker, REPOSITORY):
        assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(Path(f"{out}-{rank}").read_text()) for rank in range(RANKS)]
    resolved = ds_config.resolve(RunOptions(**options), RANKS, "cpu")
    zero = ZeroSettings.of(ds_config.finish(resolved, 1, MODEL.hidden_size, RANKS_OF_HOST))
    assert zero.secondary == (RANKS_OF_HOST if secondary else 1)
    return found, estimate_cpu_memory(footprint(MODEL, ROWS, LENGTH, torch.float32), zero, RANKS, 4, 1)


def test_less_leaves_a_host_as_planned(tmp_path: Path) -> None:
    """A second gather by all ranks is gone; a host's ranks keep a partition between them.

    Its size is counted here: a process on CPUs grows by more, which the plan does not count.
    """
    AutoModelForQuestionAnswering.from_config(MODEL).save_pretrained(tmp_path / "model")
    (plain, plan), (secondary, plan_of_secondary) = (measure(tmp_path, secondary) for secondary in (False, True))
    all_ranks = f"0-{RANKS - 1}"
    for rank, (one, other) in enumerate(zip(plain, secondary, strict=True)):
        assert other["losses"] == one["losses"]
        before, after = sent(one["moved"]), sent(other["moved"])
        host = rank // RANKS_OF_HOST * RANKS_OF_HOST
        assert before.keys() == {all_ranks} and after.keys() == {all_ranks, f"{host}-{host + RANKS_OF_HOST - 1}"}
        assert before[all_ranks] == pytest.approx(plan.spanning, rel=0.02)
        assert after[all_ranks] == pytest.approx(plan_of_secondary.spanning, rel=0.02)
        assert sum(after.values()) == pytest.approx(plan_of_secondary.sent, rel=0.02)
        assert one["secondary"] == 0
        assert other["secondary"] == pytest.approx(plan_of_secondary.parameters - plan.parameters, rel=0.02)
    left = [sent(found[0]["moved"])[all_ranks] / 2**20 for found in (plain, secondary)]
    planned = [plan.spanning / 2**20, plan_of_secondary.spanning / 2**20]
    print(f"from a host, MiB a step: zero3 {left[0]:.1f}, planned {planned[0]:.1f}; ", end="")
    print(f"secondary {left[1]:.1f}, planned {planned[1]:.1f}; ", end="")
    print(f"partition {secondary[0]['secondary'] / 2**20:.1f} MiB")
