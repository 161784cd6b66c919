"""Losses under every config that trains on CPUs, against zero0's: the same steps on real questions, on two ranks.

    python tests/bench/bench_configs.py [--steps 10] [--nvme_path FOLDER]

MiniLM with dropout; a step has 8 rows of up to 192 tokens. Prints the largest relative difference of a step's loss.
zero3_nvme needs --nvme_path.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import compiled_ops, ds_config
from qa_deepspeed.utils.errors import UserError
from tests.distributed.launching import losses, run_many
from tests.paths import DATA, MINILM

RANKS, ROWS, LENGTH = 2, 4, 192
REFERENCE = "zero0"
AT_ONCE = 4
"""Configs of a launch, which has a time limit."""


def run_options(name: str, steps: int, nvme_path: str) -> dict[str, object]:
    """A short run of one config."""
    nvme = {"nvme_path": nvme_path} if name == "zero3_nvme" else {}
    return nvme | {
        "deepspeed_config": name,
        "model_name_or_path": str(MINILM),
        "train_file": str(DATA / "en-v1-train.json"),
        "max_train_examples": steps * RANKS * ROWS,
        "max_seq_length": LENGTH,
        "doc_stride": 64,
        "per_gpu_train_batch_size": ROWS,
        "learning_rate": 5e-5,
        "max_steps": steps,
        "logging_steps": 1,
        "save_steps": 0,
    }


def reason_against(options: dict[str, object]) -> str | None:
    """Why a config does not train here, or None."""
    try:
        resolved = ds_config.resolve(RunOptions(**options, given=frozenset(options)), RANKS, "cpu")  # type: ignore[arg-type]
        ds_config.check_trainable(resolved)
        compiled_ops.require(resolved.config)
    except UserError as error:
        return str(error)
    return None


def row(folder: Path, name: str, steps: int) -> str:
    """A config's row of the table."""
    found, expected = losses(folder / name), losses(folder / REFERENCE)
    assert len(found) == steps
    return f"| `{name}` | {found[0]:.6f}, {found[-1]:.6f} | {np.abs(found / expected - 1).max():.1e} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--nvme_path", default="")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        every = {
            name: run_options(name, arguments.steps, arguments.nvme_path) for name in (REFERENCE, *ds_config.shipped())
        }
        reasons = {name: reason_against(options) for name, options in every.items()}
        names = [name for name, reason in reasons.items() if reason is None]
        print("| config | loss of the first and last step | losses differ by |\n|---|---|---|")
        for first in range(0, len(names), AT_ONCE):
            together = names[first : first + AT_ONCE]
            run_many(RANKS, {name: {**every[name], "cache_dir": str(folder / "cache")} for name in together}, folder)
            print("\n".join(row(folder, name, arguments.steps) for name in together), flush=True)
        print("\n".join(["", *(f"{name} is left out: {reason}" for name, reason in reasons.items() if reason)]))


if __name__ == "__main__":
    main()
