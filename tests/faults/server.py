"""Command lines in forked processes, imports made once, each with one failing call: `-m tests.faults.server LIBRARY`.

LIBRARY (`failing_calls.c`, compiled) must be preloaded. A request is one JSON line on the standard input:

    {"arguments": [...], "output": FILE, "folder": FOLDER, "call": 0, "at": 3, "error": 28, "stays": false}

`call` is the place of the call in `harness.CALLS`, or -1 for no fault. The answer on the standard output is one JSON
line with the exit status (negative: a signal; null: it was killed after `HANG_SECONDS`), the counts of all calls, and
how many failed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

from tests.faults.harness import CALLS

HANG_SECONDS = 120.0


def main() -> None:
    """Serve until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print while they are imported
    import_everything()
    library = ctypes.CDLL(sys.argv[1])
    library.fault_count.restype = library.fault_hits.restype = ctypes.c_long
    library.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(request, library)
        status = _wait(child)
        counts = [library.fault_count(kind) for kind in range(len(CALLS))]
        print(json.dumps({"status": status, "counts": counts, "hits": library.fault_hits()}), file=answers, flush=True)


def import_everything() -> None:
    """Import what commands import late, so that a forked process starts at once."""
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401
    import transformers.models.bert.tokenization_bert  # noqa: F401

    import qa_deepspeed.cli.evaluate  # noqa: F401
    import qa_deepspeed.cli.export  # noqa: F401
    import qa_deepspeed.cli.prepare  # noqa: F401
    import qa_deepspeed.training.tensorboard  # noqa: F401
    import qa_deepspeed.training.train  # noqa: F401


def _run(request: dict[str, Any], library: Any) -> None:
    """The forked process: the command line, to its end."""
    from qa_deepspeed.cli.main import main as run_command_line

    handle = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(handle, stream)
    status = 1
    try:
        library.fault_arm(
            request["folder"].encode(), request["call"], request["at"], request["error"], request["stays"]
        )
        run_command_line(request["arguments"])
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait(child: int) -> int | None:
    """The exit status of the process; None if it hangs and was killed."""
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    main()
