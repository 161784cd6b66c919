"""What the tests on a GPU share: their marks, the environment of their launches, and several launches at a time."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launching import run_many

gpu_marks = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]

ON_GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7"), "DS_ACCELERATOR": "cuda"}

SHORT_RUN = {"max_steps": 60, "adam_epsilon": 1e-3}
"""Long enough for the generated corpus to be learned from; epsilon keeps Adam from making updates out of rounding."""


def train_at_once(launches: Mapping[str, Mapping[str, Mapping[str, Any]]], folder: Path, **extra: str) -> None:
    """Train FOLDER/LAUNCH/RUN for every run of every launch, on one rank: launches at the same time, the runs of each
    in turn. One tiny model uses a small part of a GPU."""
    for name in launches:
        (folder / name).mkdir()
    with ThreadPoolExecutor() as pool:
        started = [pool.submit(run_many, 1, runs, folder / name, **ON_GPU, **extra) for name, runs in launches.items()]
        for launch in started:
            launch.result()
