"""A sweep of two seeds and two learning rates that is ended in its second run, and resumed by the same command.

By a signal that it answers, by SIGKILL together with its run, and by SIGKILL alone with runs of two ranks.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from tests.distributed.launching import HANG_SECONDS, alone, environment, run

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]  # five processes one after another

STEPS = 12
FIRST, SECOND = "learning_rate-1e-3_seed-1", "learning_rate-1e-3_seed-2"


@dataclass(frozen=True)
class Swept:
    """A finished sweep: its folder, the ranks of a run, how it was ended, what it printed before and when resumed."""

    folder: Path
    ranks: int
    ended_by: str
    before: str
    after: str


def end(sweep: subprocess.Popen[str], ended_by: str) -> None:
    """End a sweep: by SIGTERM, or by SIGKILL with all that it has started ("all") or without ("alone")."""
    if ended_by == "all":  # before the sweep, at whose end the run would get SIGTERM
        for process in psutil.Process(sweep.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    sweep.send_signal(signal.SIGTERM if ended_by == "SIGTERM" else signal.SIGKILL)


@pytest.fixture(
    scope="module", params=[("SIGTERM", 1), ("all", 1), ("alone", 2)], ids=lambda param: "-".join(map(str, param))
)
def swept(
    request: pytest.FixtureRequest, base_options: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Swept:
    """The sweep, ended in its second run after a checkpoint, and resumed."""
    ended_by, ranks = request.param
    folder: Path = tmp_path_factory.mktemp("sweep")
    settings = {**base_options, "max_steps": STEPS, "per_gpu_train_batch_size": 4, "save_steps": 3, "do_eval": True}
    settings |= {"deepspeed_config": "zero1", "max_eval_examples": 20, "cache_dir": str(folder / "cache")}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    grid = ["--seed", "1,2", "--learning_rate", "1e-3,1e-4", "--ranks", str(ranks)]
    command = alone("sweep", "--config", str(folder / "run.yaml"), *grid, "--output_dir", str(folder / "out"))
    process = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    second = folder / "out" / SECOND
    deadline = time.monotonic() + HANG_SECONDS
    while (
        time.monotonic() < deadline and process.poll() is None and not list(second.glob("checkpoint-*/manifest.json"))
    ):
        time.sleep(0.1)
    end(process, ended_by)
    try:
        before, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == (75 if ended_by == "SIGTERM" else -signal.SIGKILL), before
    done = run(command, folder)
    assert done.returncode == 0, (
        done.stdout + done.stderr + "".join(path.read_text()[-2000:] for path in (folder / "out/logs").iterdir())
    )
    return Swept(folder / "out", ranks, ended_by, before, done.stdout)


def test_finished_runs_are_kept_and_the_interrupted_one_resumes(swept: Swept) -> None:
    assert f"run 1 of 4: {FIRST}" in swept.before and "run 3 of 4" not in swept.before
    if swept.ended_by == "SIGTERM":
        assert f"{SECOND}: preempted after" in swept.before and "the same command resumes" in swept.before
    assert "1 of 4 runs are finished and kept" in swept.after and "run 1 of 4" not in swept.after
    log = (swept.folder / f"logs/{SECOND}.log").read_text()
    assert log.count("resuming from ") == 1
    assert ("SIGTERM: stopping after this step" in log) == (swept.ended_by != "all")
    for run_folder in swept.folder.glob("learning_rate-*"):
        steps = [json.loads(line)["step"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
        assert sorted(set(steps)) == list(range(1, STEPS + 1))


def test_the_table_is_that_of_the_runs(swept: Swept) -> None:
    summary = json.loads((swept.folder / "sweep.json").read_text())
    assert len(summary["runs"]) == 4 and [len(row["runs"]) for row in summary["settings"]] == [2, 2]
    for name, one in summary["runs"].items():
        record = json.loads((swept.folder / name / "run.json").read_text())
        assert record["metrics"] == one["metrics"] and record["options"]["seed"] == int(name[-1])
    best = summary["settings"][0]
    assert best["f1_mean"] == max(row["f1_mean"] for row in summary["settings"])
    said = f"Best by mean F1: {best['setting']}, {best['f1_mean']:.2f} ± {best['f1_std']:.2f} over 2 runs"
    assert said in swept.after
    assert "Chosen on " in swept.after and "dev.json" in swept.after and (swept.folder / "sweep.html").exists()


def test_the_runs_share_their_features(swept: Swept) -> None:
    """Those of the second learning rate build none; the rows of a seed are drawn by it (max_train_examples)."""
    logs = {path.stem: path.read_text() for path in (swept.folder / "logs").iterdir()}
    assert len(logs) == 4
    if swept.ranks == 1:  # of two, the one that does not write the log may have built them
        assert "features (built)" in logs[FIRST]
    for name in ("learning_rate-1e-4_seed-1", "learning_rate-1e-4_seed-2"):
        assert "(built)" not in logs[name] and logs[name].count("features (from the cache)") == 2
