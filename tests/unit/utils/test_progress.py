"""Progress: a bar on terminals, lines with rate and ETA elsewhere, nothing for short stages."""

import fcntl
import hashlib
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qa_deepspeed.utils import progress
from qa_deepspeed.utils.progress import MEGABYTE, ProgressBar
from tests.paths import REPOSITORY


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that ProgressBar reads, as the only entry."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_file_gets_a_line_every_half_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("training", 4000, "step", done=1000) as bar:
        for _ in range(100):
            clock[0] += 1.0
            bar.advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training: 1,300 of 4,000 steps, 10.0/s, 0:04:30 left",
        "training: 1,600 of 4,000 steps, 10.0/s, 0:04:00 left",
        "training: 1,900 of 4,000 steps, 10.0/s, 0:03:30 left",
    ]


def test_the_total_may_become_known_later(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("features", None, "question") as bar:
        for done, total in ((500, None), (500, 9000), (2000, 9000)):
            clock[0] += 40.0
            bar.reach(done, total)
    assert capsys.readouterr().err.splitlines() == [
        "features: 500 questions, 12.5/s",
        "features: 500 of 9,000 questions, 6.2/s, 0:22:40 left",
        "features: 2,000 of 9,000 questions, 16.7/s, 0:07:00 left",
    ]


def test_short_or_hidden_stages_print_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for shown, lines, seconds in ((True, True, 1.0), (False, True, 99.0), (True, False, 99.0)):
        with ProgressBar("answering", 2, "window", shown, lines) as bar:
            clock[0] += seconds
            bar.advance()
    assert capsys.readouterr().err == ""


def test_growing_files_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the blocks on the disk, also if a file's length is set at once; the end is always shown."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LOOK_SECONDS", 0.01)
    seen = ""
    with progress.write_progress("saving", tmp_path / "out", 8 * MEGABYTE):
        (tmp_path / "out").mkdir()
        with (tmp_path / "out" / "weights").open("wb") as file:
            file.truncate(8 * MEGABYTE)
            file.write(bytes(3 * MEGABYTE))
            os.fsync(file.fileno())
            for _ in range(1000):
                seen += capsys.readouterr().err
                if "saving: 3 of 8 megabytes" in seen:
                    break
                time.sleep(0.01)
    assert re.search(r"^saving: 3 of 8 megabytes, \d+\.\d/s, \d:\d\d:\d\d left$", seen, re.MULTILINE), seen
    assert "saving: 8 of 8 megabytes" in capsys.readouterr().err


def test_many_threads_read_files_by_the_megabyte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    contents = [bytes([number]) * (MEGABYTE * number + 1) for number in range(4)]
    paths = [tmp_path / str(number) for number in range(4)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    with progress.hash_progress("checking", paths) as bar, ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda path: progress.sha256_of(path, bar), paths))
    assert found == [hashlib.sha256(content).hexdigest() for content in contents]
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(1, 11)) and "of 10 megabytes" in lines[0]


def on_a_terminal(code: str) -> str:
    """Output of Python code on a terminal of 100 columns."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=terminal, stderr=terminal, cwd=REPOSITORY)
    os.close(terminal)
    seen = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(master)
    assert process.wait() == 0, seen.decode()
    return seen.decode()


def test_a_terminal_gets_a_bar_with_rate_and_time_left() -> None:
    seen = on_a_terminal(
        "import time; from qa_deepspeed.utils import progress; progress.QUIET_SECONDS = 0.1\n"
        "with progress.ProgressBar('answering', 40, 'window') as bar:\n"
        "    for _ in range(40): time.sleep(0.02); bar.advance()"
    )
    bars = seen.split("\r")
    shape = re.compile(r"answering: +\d+%.*\| \d+/40 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+window/s\]")
    assert any(shape.search(bar) for bar in bars), bars[-3:]


def test_lines_of_the_log_have_their_own_line_and_one_bar_follows_another(tmp_path: Path) -> None:
    seen = on_a_terminal(
        "import sys, time; from pathlib import Path; from qa_deepspeed.utils import dist, progress\n"
        "from qa_deepspeed.training.reporting.reporter import MetricsLogger\n"
        f"progress.QUIET_SECONDS = 0.0; reporter = MetricsLogger(Path({str(tmp_path)!r}), 6, 0)\n"
        "for step in range(1, 7):\n"
        "    reporter.advance(); time.sleep(0.15)\n"
        "    if step == 3: dist.log0('saved it')\n"
        "with progress.ProgressBar('evaluating', 3, 'batch') as bar:\n"
        "    for _ in range(3): bar.advance(); time.sleep(0.15)\n"
    )
    parts = [part.strip() for part in re.split(r"[\r\n]", seen)]
    assert "saved it" in parts, parts
    assert all(any(part.startswith(name) for part in parts) for name in ("training: ", "evaluating: ")), parts
    assert "\x1b[A" not in seen, "two bars at once: the first was not ended"
