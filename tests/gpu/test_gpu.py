"""Every shipped config in every precision on a GPU, and GPUs that talk by NCCL: `launch/test.sh -m gpu`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.launching import alone, flags, free_port, losses, run, run_many
from tests.gpu.on_gpu import ON_GPU, SHORT_RUN, gpu_marks, train_at_once
from tests.paths import REPOSITORY

pytestmark = gpu_marks

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
PRECISIONS = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}, "autocast": {"fp16_opt_level": "O1"}}
HALF = [
    (stage, precision)
    for precision in PRECISIONS
    for stage in STAGES
    if precision != "fp32" and (stage, precision) != ("zero0", "fp16")  # refused: see ds_config.check_trainable
]


@pytest.fixture(scope="module")
def runs(base_options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of every config in every precision, as PRECISION/STAGE."""
    folder: Path = tmp_path_factory.mktemp("gpu")
    options = {**base_options, **SHORT_RUN, "do_eval": True}
    cases = [*((stage, "fp32") for stage in STAGES), *HALF]
    train_at_once(
        {
            precision: {stage: {**options, **flag, "deepspeed_config": stage} for stage, of in cases if of == precision}
            for precision, flag in PRECISIONS.items()
        },
        folder,
    )
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_float32_losses_are_those_of_zero0(runs: Path, stage: str) -> None:
    np.testing.assert_allclose(losses(runs / "fp32" / stage), losses(runs / "fp32/zero0"), rtol=1e-3)


@pytest.mark.parametrize(("stage", "precision"), HALF)
def test_half_precision_learns_what_float32_learns(runs: Path, stage: str, precision: str) -> None:
    half, whole = losses(runs / precision / stage), losses(runs / "fp32/zero0")
    assert np.isfinite(half).all()
    assert half[-5:].mean() < half[:3].mean()
    assert abs(half[-5:].mean() - whole[-5:].mean()) < 0.5


@pytest.mark.parametrize("name", ["fp32/zero0", "fp32/zero3", "bf16/zero3_offload"])
def test_the_saved_model_scores_on_the_cpu_what_it_scored_on_the_gpu(runs: Path, name: str, tmp_path: Path) -> None:
    recorded = json.loads((runs / name / "run.json").read_text())["options"]
    kept = ("predict_file", "cache_dir", "version_2_with_negative", "max_seq_length", "doc_stride")
    options = {key: recorded[key] for key in kept} | {
        "model_name_or_path": runs / name,
        "output_dir": tmp_path / "again",
    }
    done = run(alone("evaluate", *flags(**options)), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    there, here = (json.loads((folder / "metrics.json").read_text()) for folder in (runs / name, tmp_path / "again"))
    assert here["total"] == there["total"]
    assert here["f1"] == pytest.approx(there["f1"], abs=2.0 if "bf16" in name else 0.5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_of_gpus_talk_by_nccl(ranks: int, tmp_path: Path) -> None:
    """collectives.py says what is checked."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    command = [
        "torchrun",
        "--nproc_per_node",
        str(ranks),
        "--master_port",
        free_port(),
        "-m",
        "tests.distributed.collectives",
    ]
    done = run([*command, str(tmp_path)], REPOSITORY, **ON_GPU)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_losses_of_one(base_options: dict[str, object], runs: Path, tmp_path: Path) -> None:
    options = {**base_options, **SHORT_RUN, "per_gpu_train_batch_size": 4}
    run_many(2, {stage: {**options, "deepspeed_config": stage} for stage in STAGES}, tmp_path, **ON_GPU)
    for stage in STAGES:
        np.testing.assert_allclose(losses(tmp_path / stage), losses(runs / "fp32/zero0"), rtol=1e-3)
