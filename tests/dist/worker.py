"""One rank of a launch that trains several runs in turn: `-m tests.dist.worker RUNS.json FOLDER`."""

import json
import sys
from pathlib import Path

from qa_deepspeed import dist
from qa_deepspeed.config import RunOptions
from qa_deepspeed.train import train


def main() -> None:
    """Train each run of the file into FOLDER/NAME."""
    runs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    dist.describe_lone_process()
    for name, options in runs.items():
        options = {**options, "output_dir": str(folder / name)}
        train(RunOptions(**options, given=frozenset(options)))
    dist.stop()


if __name__ == "__main__":
    main()
