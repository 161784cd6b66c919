"""One rank of a launch that trains several runs in turn: `-m tests.distributed.worker RUNS.json FOLDER`."""

import json
import sys
from pathlib import Path

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.training.train import train
from qa_deepspeed.utils import dist


def main() -> None:
    """Train each run of the file into FOLDER/NAME."""
    runs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    dist.ensure_rank_env()
    for name, options in runs.items():
        options = {**options, "output_dir": str(folder / name)}
        train(RunOptions(**options, given=frozenset(options)))
    dist.destroy()


if __name__ == "__main__":
    main()
