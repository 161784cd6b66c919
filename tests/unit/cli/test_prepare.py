"""The sub-command `prepare`, by several processes and from the command line of a run."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from qa_deepspeed.qa.data.examples import Answer, Example
from tests.paths import REPOSITORY
from tests.unit import small_tokenizers
from tests.unit.reference_features import write_squad

ROWS = [Example(f"q{n}", "who?", f"The Rhine rises in {n}.", (Answer("Rhine", 4),)) for n in range(9)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    small_tokenizers.tokenizer("bert").save_pretrained(tmp_path / "model")
    small_tokenizers.config("bert").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def prepare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qa_deepspeed", "prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=REPOSITORY)


@pytest.mark.distributed
def test_features_are_built_once_by_all_and_found_by_the_next(tmp_path: Path, model: Path) -> None:
    train, predict = write_squad(tmp_path / "train.json", ROWS), write_squad(tmp_path / "predict.json", ROWS[:4])
    run = (
        "--model_name_or_path",
        model,
        "--train_file",
        train,
        "--predict_file",
        predict,
        "--cache_dir",
        tmp_path / "c",
    )
    first = prepare(*run, "--num_proc", 2)
    assert first.returncode == 0, first.stderr
    assert "9 questions, 9 features" in first.stdout and "4 questions, 4 features" in first.stdout
    second = prepare(*run, "--seed", "7")
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("(found in") == 2
    third = prepare(*run, "--overwrite_cache", "--num_proc", 2)
    assert third.returncode == 0, third.stderr
    assert third.stdout.count("(built in") == 2
    tokens = {path.read_text() for path in (tmp_path / "c").rglob(".overwritten")}
    assert len(tokens) == 1, "the processes discarded each other's features"


@pytest.mark.distributed
def test_a_helper_that_is_stopped_is_not_waited_for(tmp_path: Path, model: Path) -> None:
    command = [sys.executable, "-m", "qa_deepspeed", "prepare", "--num_proc", "2", "--cache_dir", str(tmp_path / "c")]
    command += ["--model_name_or_path", str(model), "--train_file", write_squad(tmp_path / "train.json", ROWS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY) as main:
        helpers: list[psutil.Process] = []
        while not helpers and main.poll() is None:
            time.sleep(0.02)
            children = psutil.Process(main.pid).children()
            helpers = [one for one in children if any("spawn_main" in word for word in one.cmdline())]
        helpers[0].suspend()
        printed, errors = main.communicate(timeout=120)
    assert main.returncode == 0, errors
    assert "9 questions, 9 features (built in" in printed
    assert not helpers[0].is_running()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no data is named"),
        (("--train_file", "gone.json"), "gone.json"),
        (("--train_file", "x", "--num_proc", 0), "num_proc"),
    ],
)
def test_mistakes_are_one_line(model: Path, arguments: tuple[object, ...], message: str) -> None:
    done = prepare("--model_name_or_path", model, *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
