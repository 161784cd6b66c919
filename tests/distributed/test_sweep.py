"""A sweep of two seeds and two learning rates, killed in its second run and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.distributed.launching import HANG_SECONDS, alone, environment, run

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]  # five processes one after another

STEPS = 12


@pytest.fixture(scope="module")
def swept(base_options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The sweep's folder, and what it printed until it was killed and after it was resumed."""
    folder: Path = tmp_path_factory.mktemp("sweep")
    settings = {**base_options, "max_steps": STEPS, "per_gpu_train_batch_size": 4, "save_steps": 3, "do_eval": True}
    settings |= {"deepspeed_config": "zero1", "max_eval_examples": 20}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    grid = ["--seed", "1,2", "--learning_rate", "1e-3,1e-4"]
    command = alone("sweep", "--config", str(folder / "run.yaml"), *grid, "--output_dir", str(folder / "out"))
    process = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    second = folder / "out/learning_rate-1e-3_seed-2"
    deadline = time.monotonic() + HANG_SECONDS
    while (
        time.monotonic() < deadline and process.poll() is None and not list(second.glob("checkpoint-*/manifest.json"))
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    try:
        killed, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, killed
    done = run(command, folder)
    assert done.returncode == 0, (
        done.stdout + done.stderr + "".join(path.read_text()[-2000:] for path in (folder / "out/logs").iterdir())
    )
    return folder / "out", killed, done.stdout


def test_finished_runs_are_kept_and_the_interrupted_one_resumes(swept: tuple[Path, str, str]) -> None:
    folder, killed, resumed = swept
    assert "run 1 of 4: learning_rate-1e-3_seed-1" in killed and "run 3 of 4" not in killed
    assert "learning_rate-1e-3_seed-2: preempted after" in killed and "the same command resumes" in killed
    assert "1 of 4 runs are finished and kept" in resumed and "run 1 of 4" not in resumed
    log = (folder / "logs/learning_rate-1e-3_seed-2.log").read_text()
    assert log.count("resuming from ") == 1
    for run_folder in folder.glob("learning_rate-*"):
        steps = [json.loads(line)["step"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
        assert sorted(set(steps)) == list(range(1, STEPS + 1))


def test_the_table_is_that_of_the_runs(swept: tuple[Path, str, str]) -> None:
    folder, _, printed = swept
    summary = json.loads((folder / "sweep.json").read_text())
    assert len(summary["runs"]) == 4 and [len(row["runs"]) for row in summary["settings"]] == [2, 2]
    for name, one in summary["runs"].items():
        record = json.loads((folder / name / "run.json").read_text())
        assert record["metrics"] == one["metrics"] and record["options"]["seed"] == int(name[-1])
    best = summary["settings"][0]
    assert best["f1_mean"] == max(row["f1_mean"] for row in summary["settings"])
    assert f"Best by mean F1: {best['setting']}, {best['f1_mean']:.2f} ± {best['f1_std']:.2f} over 2 runs" in printed
    assert "Chosen on " in printed and "dev.json" in printed and (folder / "sweep.html").exists()


def test_the_runs_share_their_features(swept: tuple[Path, str, str]) -> None:
    """Those of the second learning rate build none; the rows of a seed are drawn by it (max_train_examples)."""
    logs = {path.stem: path.read_text() for path in (swept[0] / "logs").iterdir()}
    assert len(logs) == 4 and "features (built)" in logs["learning_rate-1e-3_seed-1"]
    for name in ("learning_rate-1e-4_seed-1", "learning_rate-1e-4_seed-2"):
        assert "(built)" not in logs[name] and logs[name].count("features (from the cache)") == 2
