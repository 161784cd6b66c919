"""Ranks whose micro-batches have the fixed shapes of graphs: `-m ... graphs_worker RUNS.json FOLDER`.

As `worker`; runs with `cuda_graphs` true use `StepGraphs`, with a stand-in for captured graphs that repeats the work;
the others have an ordinary forward and backward pass of the same rows.
"""

import json
import sys
from pathlib import Path

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import cuda_graphs
from qa_deepspeed.training import loop, train
from qa_deepspeed.utils import dist


def main() -> None:
    """Train each run of the file into FOLDER/NAME."""
    runs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    dist.ensure_rank_env()
    train.require_graphs = lambda *arguments: None
    train.uses_graphs = lambda *arguments: True
    train.use_own_stream = lambda: None
    cuda_graphs.capture_on_gpu = lambda pool: lambda work: work  # type: ignore[assignment,misc]
    loop.Run.uses_graphs = property(lambda run: run.options.cuda_graphs == "true")  # type: ignore[assignment,method-assign]
    for name, options in runs.items():
        options = {**options, "output_dir": str(folder / name)}
        train.train(RunOptions(**options, given=frozenset(options)))
    dist.destroy()


if __name__ == "__main__":
    main()
