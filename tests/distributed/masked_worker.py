"""One rank that trains several runs and writes down the dropout masks of each: `-m ... masked_worker RUNS.json FOLDER`.

As `worker`; the masks of a run go into FOLDER/NAME.masks-RANK.json, a list with the first bits of every mask drawn.
"""

import json
import sys
from pathlib import Path

import torch

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.attention.cpu_dropout import KeepMasks
from qa_deepspeed.training.train import train
from qa_deepspeed.utils import dist

BITS = 96
"""Masks are compared by their first values: those of one seed are the same whatever their shapes."""


def main() -> None:
    """Train each run of the file into FOLDER/NAME."""
    runs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    dist.ensure_rank_env()
    drawn: list[str] = []
    draw = KeepMasks.draw

    def noted(masks: KeepMasks, *shape: int) -> torch.Tensor:
        mask = draw(masks, *shape)
        drawn.append(bytes(mask.reshape(-1)[:BITS].tolist()).hex()[1::2])
        return mask

    KeepMasks.draw = noted  # type: ignore[method-assign]
    for name, options in runs.items():
        options = {**options, "output_dir": str(folder / name)}
        train(RunOptions(**options, given=frozenset(options)))
        (folder / f"{name}.masks-{dist.rank()}.json").write_text(json.dumps(drawn))
        drawn.clear()
    dist.destroy()


if __name__ == "__main__":
    main()
