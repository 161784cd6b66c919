"""Command lines in forked processes, imports made once, each with one failing call: `-m tests.faults.server LIBRARY`.

LIBRARY (`failing_calls.c`, compiled) must be preloaded. A request is one JSON line on the standard input, made by
`harness.Server.run`: `arguments` of the command line, the file `output` for what it prints, the `folder` whose files
count, the fault (`call`, its place in `harness.CALLS` or -1 for none, `at`, `error`, `stays`), and `learn`, to import
here what the command imports, so that later ones start at once.

The answer on the standard output is one JSON line with the exit status (negative: a signal; null: it was killed after
`HANG_SECONDS`), the counts of all calls, and how many failed.

Charts are blank: to draw them takes half of the time of a run this small.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.faults.harness import CALLS

HANG_SECONDS = 120.0


def main() -> None:
    """Serve until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print while they are imported
    import qa_deepspeed.training.train  # noqa: F401

    _leave_charts_blank()
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
        if request["learn"]:
            _import_like(_modules_file(request))
        counts = [library.fault_count(kind) for kind in range(len(CALLS))]
        print(json.dumps({"status": status, "counts": counts, "hits": library.fault_hits()}), file=answers, flush=True)


def _leave_charts_blank() -> None:
    from matplotlib.figure import Figure

    from qa_deepspeed.qa.report import charts

    def blank(*values: Any) -> Figure:
        return Figure(figsize=(charts.WIDTH / charts.DPI, charts.HEIGHT / charts.DPI), dpi=charts.DPI)

    for name in ("_calibration", "_precision_recall", "_slice"):
        assert hasattr(charts, name)
        setattr(charts, name, blank)


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
    if request["learn"]:
        _modules_file(request).write_text(json.dumps(list(sys.modules)))
    os._exit(status)


def _modules_file(request: dict[str, Any]) -> Path:
    return Path(request["output"]).with_suffix(".modules")


def _import_like(listed: Path) -> None:
    for name in json.loads(listed.read_text()):
        with contextlib.suppress(Exception):  # some are made at run time
            importlib.import_module(name)


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
