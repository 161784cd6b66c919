"""Students of two teachers on two ranks, at every stage and after a stop, and on one; checks in distillation_scenes.py.

`launch/test.sh -m slow -k learn_from_teachers`.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering

from tests.distributed.launching import free_port, losses, run, run_many
from tests.paths import REPOSITORY

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def save_teacher(model: Path, folder: Path, seed: int) -> str:
    """A copy of a model whose logits are far apart."""
    shutil.copytree(model, folder)
    teacher = AutoModelForQuestionAnswering.from_pretrained(folder)
    torch.manual_seed(seed)
    torch.nn.init.normal_(teacher.qa_outputs.weight, std=0.4)
    teacher.save_pretrained(folder)
    return str(folder)


def test_students_learn_from_teachers(
    base_options: dict[str, object], model_without_dropout: Path, tmp_path: Path
) -> None:
    teachers = [save_teacher(model_without_dropout, tmp_path / f"teacher-{seed}", seed) for seed in (1, 2)]
    options = {
        **base_options,
        "cache_dir": str(tmp_path / "cache"),
        "max_steps": 8,
        "per_gpu_train_batch_size": 4,
        "adam_epsilon": 1e-3,
        "teacher_model_name_or_path": ",".join(teachers),
        "distillation_weight": 0.9,
        "distillation_temperature": 2.0,
    }
    (tmp_path / "options.json").write_text(json.dumps(options))
    scenes = ["-m", "tests.distributed.distillation_scenes", str(tmp_path / "options.json"), str(tmp_path)]
    done = run(["torchrun", "--nproc_per_node", "2", "--master_port", free_port(), *scenes], REPOSITORY)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-4000:]
    alone = {"deepspeed_config": "zero1", "per_gpu_train_batch_size": 8, "cache_dir": str(tmp_path / "its-own")}
    run_many(1, {"alone": {**options, **alone}}, tmp_path)
    np.testing.assert_allclose(losses(tmp_path / "alone"), losses(tmp_path / "zero3"), rtol=1e-4)
