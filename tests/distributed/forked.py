"""Command lines in processes of their own, imports made once: `-m tests.distributed.forked COMMANDS.json FOLDER`.

The standard error and the exit status of command N go to FOLDER/N.err and FOLDER/N.status.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import qa_deepspeed.training.train  # noqa: F401  what takes long, before the processes part
from qa_deepspeed.cli.main import main as run_command_line


def main() -> None:
    """Run each command of the file."""
    commands, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for number, arguments in enumerate(commands):
        child = os.fork()
        if child == 0:
            os.dup2(os.open(folder / f"{number}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            status = 1
            try:
                run_command_line(arguments)
            except SystemExit as end:
                status = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
        _, waited = os.waitpid(child, 0)
        (folder / f"{number}.status").write_text(str(os.waitstatus_to_exitcode(waited)))


if __name__ == "__main__":
    main()
