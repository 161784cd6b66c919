"""Evaluation on any number of ranks: few questions, uneven shards, partitioned weights, and a rank that dies."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer

from tests.distributed.launching import environment, free_port, run
from tests.paths import REPOSITORY

pytestmark = pytest.mark.distributed

SIZES = list(range(1, 18))
FILES = ("predictions.json", "nbest_predictions.json", "null_odds.json", "metrics.json", "report.json")


@pytest.fixture(scope="module")
def options(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """An evaluation of an untrained model, micro-batches of two rows, some questions in several windows.

    Its biases are not 0, or the order in which a linear layer adds them would not show.
    """
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_config(AutoConfig.from_pretrained(sample / "model"))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(sample / "model").save_pretrained(folder)
    return {
        "model_name_or_path": str(folder),
        "predict_file": str(sample / "dev.json"),
        "cache_dir": str(folder / "cache"),
        "version_2_with_negative": True,
        "max_seq_length": 48,
        "max_query_length": 20,
        "doc_stride": 16,
        "per_gpu_eval_batch_size": 2,
        "n_best_size": 5,
    }


def evaluate(ranks: int, options: dict[str, object], folder: Path) -> None:
    """All sizes, whole and partitioned, in one launch; files go to folder/CONFIG-SIZE."""
    folder.mkdir()
    task = {"options": options, "sizes": SIZES, "folder": str(folder), "configs": ["zero0", "zero3"]}
    (folder / "task.json").write_text(json.dumps(task))
    command = [
        "torchrun",
        "--nproc_per_node",
        str(ranks),
        "--master_port",
        free_port(),
        "-m",
        "tests.distributed.evaluations",
    ]
    done = run([*command, str(folder / "task.json")], REPOSITORY)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def alone(options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank wrote."""
    folder: Path = tmp_path_factory.mktemp("alone") / "1"
    evaluate(1, options, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_few_questions_on_many_ranks_agree_byte_for_byte(
    options: dict[str, object], alone: Path, tmp_path: Path, ranks: int
) -> None:
    """1 to 17 questions, of which ranks get none, or unequal numbers; also with weights in parts."""
    evaluate(ranks, options, tmp_path / "many")
    for size in SIZES:
        assert len(json.loads((alone / f"zero0-{size}/predictions.json").read_text())) == size
        for name in FILES:
            expected = (alone / f"zero0-{size}" / name).read_bytes()
            assert (alone / f"zero3-{size}" / name).read_bytes() == expected, (size, name)
            for config in ("zero0", "zero3"):
                assert (tmp_path / "many" / f"{config}-{size}" / name).read_bytes() == expected, (config, size, name)


@pytest.mark.parametrize("config", [pytest.param("zero0", marks=pytest.mark.slow), "zero3"])
def test_when_a_rank_dies_the_other_ends_with_a_clear_error(
    options: dict[str, object], tmp_path: Path, config: str
) -> None:
    """Without a launcher that would end it: rank 1 ends in its second forward pass."""
    task = {"options": options, "sizes": [17], "folder": str(tmp_path), "configs": [config], "dies": [1, 2]}
    (tmp_path / "task.json").write_text(json.dumps(task))
    port, began = free_port(), time.perf_counter()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.evaluations", str(tmp_path / "task.json")],
            cwd=REPOSITORY,
            text=True,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
        )
        for rank in range(2)
    ]
    try:
        errors = ranks[0].communicate(timeout=120)[1]
        assert ranks[1].wait(timeout=10) == 7
    finally:
        for process in ranks:
            process.kill()
    assert ranks[0].returncode not in (0, None)
    assert "error: rank 0 waited in the evaluation for a rank that has ended or hangs" in errors, errors[-3000:]
    assert time.perf_counter() - began < 90
    assert not (tmp_path / f"{config}-17/predictions.json").exists()
