"""LoRA on two ranks at every ZeRO stage: training, resuming, exporting, evaluating; the checks are in lora_scenes.py.

`launch/test.sh -m slow -k adapters_train`.
"""

import json
from pathlib import Path

import pytest

from tests.distributed.launching import free_port, run
from tests.paths import REPOSITORY

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_adapters_train_resume_export_and_evaluate(base_options: dict[str, object], tmp_path: Path) -> None:
    options = {
        **base_options,
        "max_steps": 4,
        "save_steps": 2,
        "per_gpu_train_batch_size": 4,
        "adam_epsilon": 1e-3,
        "lora_rank": 4,
        "do_eval": True,
        "max_eval_examples": 20,
        "learning_rate": 1e-2,
    }
    (tmp_path / "options.json").write_text(json.dumps(options))
    command = ["torchrun", "--nproc_per_node", "2", "--master_port", free_port(), "-m", "tests.distributed.lora_scenes"]
    done = run([*command, str(tmp_path / "options.json"), str(tmp_path)], REPOSITORY)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-4000:]
