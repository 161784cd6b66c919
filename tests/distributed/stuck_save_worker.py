"""As `worker`; the second checkpoint is never completed, and a file `stuck` says when it is being written."""

import time
from pathlib import Path
from typing import Any

from qa_deepspeed.engine.checkpoints.checkpoint import CheckpointWriter
from tests.distributed import worker


def main() -> None:
    """Train each run of the file into FOLDER/NAME."""
    complete = CheckpointWriter._complete

    def completing(writer: CheckpointWriter, partial: Path, final: Path, *rest: Any) -> None:
        if final.name == "checkpoint-4":
            (final.parent / "stuck").touch()
            time.sleep(600)
        complete(writer, partial, final, *rest)

    CheckpointWriter._complete = completing  # type: ignore[method-assign]
    worker.main()


if __name__ == "__main__":
    main()
