"""The sweep's grid, its runs as processes, and what is kept."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qa_deepspeed.cli.main import Parser, main
from qa_deepspeed.cli.training import sweep
from qa_deepspeed.cli.training.sweep_runs import Launch, SweepRun, finished_record, run_all
from qa_deepspeed.config import options
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.runs.folder import write_run
from qa_deepspeed.runs.lock import user_of
from qa_deepspeed.utils.errors import UserError
from tests.paths import REPOSITORY

BASE = ["--model_name_or_path", "m", "--train_file", "t.json", "--predict_file", "d.json", "--output_dir", "out"]


def parsed(*given: str) -> argparse.Namespace:
    parser = Parser(prog="sweep", allow_abbrev=False)
    parser.set_defaults(command="sweep")
    sweep.add_arguments(parser)
    return parser.parse_all([*BASE, *given])


def planned(*given: str) -> list[SweepRun]:
    return sweep.plan_runs(parsed(*given))


def test_every_combination_is_a_run_and_seeds_follow_each_other() -> None:
    runs = planned("--seed", "1,2", "--learning_rate", "2e-5,3e-5", "--bf16")
    assert [(run.options.learning_rate, run.options.seed) for run in runs] == [
        (2e-5, 1),
        (2e-5, 2),
        (3e-5, 1),
        (3e-5, 2),
    ]
    assert runs[1].name == "learning_rate-2e-5_seed-2" and runs[1].setting == "learning_rate 2e-5"
    assert all(run.options.do_eval and run.options.bf16 for run in runs)
    assert [run.options.output_dir for run in runs] == [str(run.folder) for run in runs]
    assert {run.folder.parent for run in runs} == {Path("out")}


def test_values_of_the_file_are_the_base_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-4\nseed: 9\nweight_decay: 0.1\n")
    runs = planned("--config", str(file), "--seed", "1,2")
    assert [(run.options.seed, run.options.learning_rate, run.options.weight_decay) for run in runs] == [
        (1, 1e-4, 0.1),
        (2, 1e-4, 0.1),
    ]
    assert runs[0].setting == "one setting"


def test_lists_and_paths_with_commas_are_one_value(tmp_path: Path) -> None:
    odd = tmp_path / "model,1"
    odd.mkdir()
    models = planned("--model_name_or_path", f"{odd}", "--train_file", "a.json,b.json", "--seed", "1,2")
    assert len(models) == 2 and models[0].options.train_file == "a.json,b.json"
    names = [run.name for run in planned("--model_name_or_path", "x/bert,y/roberta large")]
    assert names == ["model_name_or_path-bert", "model_name_or_path-roberta-large"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "nothing varies"),
        (("--seed", "1"), "nothing varies"),
        (("--seed", "1,,2"), "seed '1,,2': a value is missing"),
        (("--seed", "1,1"), "two runs would have the folder seed-1"),
        (("--seed", "1,x"), "option 'seed' in the command line must be a whole number"),
        (("--seed", "1,2", "--overwrite_output_dir"), "sweep takes no overwrite_output_dir: delete the output_dir"),
        (("--seed", "1,2", "--do_train=false"), "sweep takes no do_train"),
        (("--seed", "1,2", "--push_to_hub", "me/model"), "sweep takes no push_to_hub"),
        (("--seed", "1,2", "--do_eval=false"), "a sweep chooses by the scores"),
        (("--output_dir", "a,b"), "output_dir has several values"),
    ],
)
def test_what_cannot_be_swept_is_one_line(given: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        planned(*given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_seeds_need_the_same_questions() -> None:
    arguments = parsed("--seed", "1,2", "--validation_split", "0.1")
    arguments.predict_file = None
    del arguments.predict_file
    with pytest.raises(UserError, match="validation_split draws other questions with each seed"):
        sweep.plan_runs(arguments)
    del arguments.validation_split
    with pytest.raises(UserError, match="the development file, by which the sweep chooses"):
        sweep.plan_runs(arguments)


def test_a_sweep_under_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="call it without a launcher, with --ranks or --launcher"):
        sweep.run(parsed("--seed", "1,2"))


def test_the_list_has_a_file_for_each_run_that_train_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        main(["sweep", *BASE, "--seed", "1,2", "--list"])
    listed = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and listed == ["out/configs/seed-1.yaml", "out/configs/seed-2.yaml"]
    for file, run in zip(listed, planned("--seed", "1,2"), strict=True):
        assert options.build(RunOptions, "train", {}, file).to_dict() == run.options.to_dict()
        assert not run.folder.exists()


def test_commands_of_a_run() -> None:
    run = planned("--seed", "1,2")[0]
    call = ["qa_deepspeed", "train", "--config", "out/configs/seed-1.yaml", "--output_dir", "out/seed-1"]
    assert Launch(1, None, 1, ()).command(run) == [sys.executable, "-m", *call]
    torchrun = Launch(4, None, 1, ()).command(run)
    assert torchrun[1:] == ["-m", "qa_deepspeed.torchrun", "--standalone", "--nproc_per_node", "4", "-m", *call]
    launcher = Launch(1, "deepspeed --hostfile 'my hosts' --module", 1, ()).command(run)
    assert launcher == ["deepspeed", "--hostfile", "my hosts", "--module", *call]


def test_runs_at_once_have_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    launch = Launch.of(RunOptions(), 2, None, None)
    assert launch.at_once == 2
    assert [launch.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["4,5", "6,7"]
    assert Launch.of(RunOptions(no_cuda=True), 2, None, None).at_once == 1
    assert Launch.of(RunOptions(), 4, None, None).environment(0)["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    for ranks, launcher, at_once, message in (
        (8, None, None, "--ranks 8: a run has a GPU for each rank, and here are 4"),
        (0, None, None, "at least 1"),
        (1, None, 0, "at least 1"),
        (2, "deepspeed", None, "--launcher says how many ranks"),
    ):
        with pytest.raises(UserError, match=message):
            Launch.of(RunOptions(), ranks, launcher, at_once)


def run_in(folder: Path, name: str) -> SweepRun:
    given = {"output_dir": str(folder / name), "seed": "3", "do_eval": "true"}
    return SweepRun(name, "one setting", folder / name, options.build(RunOptions, "train", given, None))


def finish(run: SweepRun, **changes: object) -> None:
    """What `train` leaves in a run's folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    recorded = {**run.options.to_dict(), **changes}
    write_run(run.folder, "finished", {}, options=recorded, metrics={"f1": 50.0, "exact": 40.0})


def test_only_a_finished_run_of_the_same_options_is_kept(tmp_path: Path) -> None:
    run = run_in(tmp_path, "a")
    assert finished_record(run) is None
    finish(run)
    record = finished_record(run)
    assert record is not None and record["metrics"]["f1"] == 50.0
    changed = replace(run, options=replace(run.options, seed=4))
    assert finished_record(changed) is None
    write_run(run.folder, "running", {}, options=run.options.to_dict(), metrics={})
    assert finished_record(run) is None
    (run.folder / "run.json").write_text("{")
    assert finished_record(run) is None


class FakeLaunch(Launch):
    """Runs a Python program in place of `train`."""

    def command(self, run: SweepRun) -> list[str]:
        return [sys.executable, "-c", str(self.launcher), str(run.folder)]


FINISHES = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True, exist_ok=True)
(folder / "began").write_text(str(time.monotonic())); time.sleep(1.5)
(folder / "ended").write_text(str(time.monotonic()))
print("qa-deepspeed: error: no luck"); sys.exit(2 if folder.name == "b" else 0)
"""


def test_a_failed_run_does_not_keep_the_others_from_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run_in(tmp_path, name) for name in "abcd"]
    for run in runs:
        if run.name != "b":
            finish(run)
    kept = runs[3]
    for run in runs[:3]:  # only d is finished beforehand: the others get their records from elsewhere
        (run.folder / "run.json").unlink(missing_ok=True)
    statuses = run_all(runs, FakeLaunch(1, FINISHES, 1, ()))
    assert statuses == {"d": 0, "a": 1, "b": 2, "c": 1}  # status 0 without a record is no success
    out = capsys.readouterr().out
    assert "1 of 4 runs are finished and kept" in out and not (kept.folder / "began").exists()
    assert "b: failed with status 2" in out and "no luck" in out


def test_runs_at_once_overlap(tmp_path: Path) -> None:
    def span(name: str) -> tuple[float, float]:
        began, ended = (float((tmp_path / name / file).read_text()) for file in ("began", "ended"))
        return began, ended

    run_all([run_in(tmp_path, name) for name in "ac"], FakeLaunch(1, FINISHES, 2, ()))
    (a, a_end), (c, c_end) = span("a"), span("c")
    assert max(a, c) < min(a_end, c_end)


WAITS = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True, exist_ok=True)
def end(*_):
    (folder / "terminated").touch(); sys.exit(75)
signal.signal(signal.SIGTERM, end)
(folder / "began").touch(); time.sleep(60)
"""


def test_a_signal_ends_the_running_ones_and_starts_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run_in(tmp_path, name) for name in "abc"]

    def interrupt() -> None:
        while not (tmp_path / "b" / "began").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    before = signal.getsignal(signal.SIGINT)
    assert run_all(runs, FakeLaunch(1, WAITS, 2, ())) == {"a": 75, "b": 75}
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().out.count("preempted after") == 2 and not (tmp_path / "c").exists()


PASSES_NO_SIGNAL_ON = f"""
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.exit(subprocess.call([sys.executable, "-c", {WAITS!r}, sys.argv[1]]))
"""


def test_a_signal_reaches_runs_whose_launcher_passes_none_on(tmp_path: Path) -> None:
    """Such as those of the deepspeed command."""

    def interrupt() -> None:
        wait_for(tmp_path / "a" / "began")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    assert run_all([run_in(tmp_path, "a")], FakeLaunch(1, PASSES_NO_SIGNAL_ON, 1, ())) == {"a": 75}
    assert (tmp_path / "a" / "terminated").exists()


SWEEPS = """
import sys
from pathlib import Path
from qa_deepspeed.cli.training.sweep_runs import run_all
from tests.unit.cli.test_sweep import FakeLaunch, WAITS, run_in
run_all([run_in(Path(sys.argv[1]), "a")], FakeLaunch(1, WAITS, 1, ()))
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sends a process a signal when its parent ends")
def test_a_run_ends_when_its_sweep_is_killed(tmp_path: Path) -> None:
    """By SIGKILL, which the sweep cannot answer: the run gets SIGTERM, on which it saves."""
    sweep = subprocess.Popen([sys.executable, "-c", SWEEPS, tmp_path], cwd=REPOSITORY)
    try:
        wait_for(tmp_path / "a" / "began")
    finally:
        sweep.kill()
        sweep.wait()
    wait_for(tmp_path / "a" / "terminated")


USES = """
import sys, time
from pathlib import Path
from qa_deepspeed.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
Path(sys.argv[1], "began").touch()
time.sleep(3)
lock.release()
"""


def test_a_folder_that_is_still_in_use_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the run of a killed sweep, which saves; then the run is started, and those after it."""
    runs = [run_in(tmp_path, name) for name in "ac"]
    runs[0].folder.mkdir()
    assert user_of(runs[0].folder) is None
    with subprocess.Popen([sys.executable, "-c", USES, runs[0].folder], cwd=REPOSITORY) as other:
        wait_for(runs[0].folder / "began")
        assert user_of(runs[0].folder) == f"process {other.pid} on {socket.gethostname()}"
        run_all(runs, FakeLaunch(1, FINISHES, 1, ()))
        assert other.wait() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"a: process {other.pid} on ") and lines[0].endswith("waiting until it ends")
    assert [line.split(":")[0] for line in lines[1:]] == ["run 1 of 2", "a", "run 2 of 2", "c"]
    assert user_of(runs[0].folder) is None


def test_a_launcher_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--launcher 'no-such-program x' cannot be started: No such file"):
        run_all([run_in(tmp_path, "a")], Launch(1, "no-such-program x", 1, ()))


def test_the_summary_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, JSON and page of three finished runs of two settings."""
    context = "Ann Lee flew from Rome to Oslo in 1901."
    gold = [
        {
            "context": f"{context} It was the flight {number}.",
            "qas": [{"id": f"q{number}", "question": "Who flew?", "answers": [{"text": "Ann Lee", "answer_start": 0}]}],
        }
        for number in range(20)
    ]
    (tmp_path / "dev.json").write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": gold}]}))
    base = RunOptions(predict_file=str(tmp_path / "dev.json"), output_dir=str(tmp_path))
    runs, scores = [], []
    for name, setting, right in (("a", "x 1", 18), ("b", "x 1", 16), ("c", "x 2", 4)):
        answers = {f"q{number}": "Ann Lee" if number < right else "Rome" for number in range(20)}
        metrics = {"f1": 5.0 * right, "exact": 5.0 * right}
        runs.append(SweepRun(name, setting, tmp_path / name, base))
        scores.append(sweep.RunScores(name, setting, metrics, answers))
    sweep.report(tmp_path, runs, scores)
    out = capsys.readouterr().out
    assert "85.00 ± 7.07" in out and "a (90.00)" in out and f"Chosen on {tmp_path}/dev.json" in out
    summary = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["setting"] for row in summary["settings"]] == ["x 1", "x 2"]
    assert summary["tests"][0]["difference"] == pytest.approx(-65)
    page = (tmp_path / "sweep.html").read_text()
    assert 'href="a/report.html"' in page and "every other setting is significantly worse" in page
