"""What only a GPU can show: fp16, NCCL, fused kernels, offload. `launch/test.sh -m gpu` on a machine that has one."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.dist.conftest import base_options, model_without_dropout, sample  # noqa: F401
from tests.dist.launching import alone, flags, losses, run, run_many

pytestmark = [
    pytest.mark.gpu, pytest.mark.distributed, pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]  # fmt: skip

ON_GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7"), "DS_ACCELERATOR": "cuda"}
STEPS = 60

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
PRECISIONS = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}, "autocast": {"fp16_opt_level": "O1"}}
RUNS = {
    f"{stage}_{precision}": {"deepspeed_config": stage, **flag}
    for stage in STAGES
    for precision, flag in PRECISIONS.items()
    if (stage, precision) != ("zero0", "fp16")  # refused: see ds_config.check_trainable
}


@pytest.fixture(scope="module")
def runs(base_options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A folder with a run of every shipped config in every precision, on one GPU."""
    folder: Path = tmp_path_factory.mktemp("gpu")
    options = {**base_options, "max_steps": STEPS, "adam_epsilon": 1e-3, "do_eval": True}
    run_many(1, {name: {**options, **extra} for name, extra in RUNS.items()}, folder, **ON_GPU)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_float32_losses_are_those_of_zero0(runs: Path, stage: str) -> None:
    np.testing.assert_allclose(losses(runs / f"{stage}_fp32"), losses(runs / "zero0_fp32"), rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in RUNS if not name.endswith("fp32")])
def test_half_precision_learns_what_float32_learns(runs: Path, name: str) -> None:
    half, whole = losses(runs / name), losses(runs / "zero0_fp32")
    assert np.isfinite(half).all()
    assert half[-5:].mean() < half[:3].mean()
    assert abs(half[-5:].mean() - whole[-5:].mean()) < 0.5


@pytest.mark.parametrize("name", ["zero0_fp32", "zero3_fp32", "zero3_offload_bf16"])
def test_the_saved_model_scores_on_the_cpu_what_it_scored_on_the_gpu(runs: Path, name: str, tmp_path: Path) -> None:
    told = json.loads((runs / name / "run.json").read_text())["options"]
    kept = ("predict_file", "cache_dir", "version_2_with_negative", "max_seq_length", "doc_stride")
    options = {key: told[key] for key in kept} | {"model_name_or_path": runs / name, "output_dir": tmp_path / "again"}
    done = run(alone("evaluate", *flags(**options)), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    there, here = (json.loads((folder / "metrics.json").read_text()) for folder in (runs / name, tmp_path / "again"))
    assert here["total"] == there["total"]
    assert here["f1"] == pytest.approx(there["f1"], abs=2.0 if "bf16" in name else 0.5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_losses_of_one(base_options: dict[str, object], runs: Path, tmp_path: Path) -> None:  # noqa: F811
    options = {**base_options, "max_steps": STEPS, "adam_epsilon": 1e-3, "per_gpu_train_batch_size": 4}
    run_many(2, {stage: {**options, "deepspeed_config": stage} for stage in STAGES}, tmp_path, **ON_GPU)
    for stage in STAGES:
        np.testing.assert_allclose(losses(tmp_path / stage), losses(runs / "zero0_fp32"), rtol=1e-3)
