"""Runs, caches, checkpoints and imports of an earlier release keep working.

tests/data/version_0_1 holds what commit 0a2cc4a wrote; its README says how. Commands in it have paths relative to the
folder, so each test works in a copy and starts processes there.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.facts import model_facts
from qa_deepspeed.training.features import EPOCH_ROWS, load_features, look_up_features
from tests.distributed.launching import alone, losses, run
from tests.paths import REPOSITORY

pytestmark = pytest.mark.distributed

EARLIER = REPOSITORY / "tests" / "data" / "version_0_1"
COMMANDS: dict[str, list[str]] = json.loads((EARLIER / "commands.json").read_text())
EXPECTED: dict[str, Any] = json.loads((EARLIER / "expected.json").read_text())
FEATURES: dict[str, Any] = json.loads((EARLIER / "features.json").read_text())
FINISHED, INTERRUPTED = Path("runs/finished"), Path("runs/interrupted")
DONE = 4
"""Optimizer steps of the interrupted run's checkpoint."""
LOGITS = 1e-4
"""Absolute tolerance of logits and null odds; torch's kernels for other instruction sets differ by 2e-6."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the earlier version's folder."""
    return Path(shutil.copytree(EARLIER, tmp_path / "version_0_1"))


def succeed(command: list[str], folder: Path) -> str:
    """Run the command in `folder`; its standard output."""
    done = run(command, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def read(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by its relative name; not the empty ones that are only locked."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def cached(folder: Path) -> dict[str, bytes]:
    """The files of the feature cache; not the digests of input files, which hold absolute paths."""
    return {name: data for name, data in contents(folder / "cache").items() if not name.endswith("digests.json")}


def require_cached(folder: Path) -> None:
    """Assert that the earlier version's features were used and not changed, but for evaluations.

    Their entries have another version: they distinguish unanswerable questions from those without gold answers.
    """
    before, now = cached(EARLIER), cached(folder)
    assert before.items() <= now.items()
    assert all("/evaluate-" in name for name in now.keys() - before.keys()), "features were built again"


# ---- runs ----


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_interrupted_run_resumes_from_its_checkpoint_with_the_losses_of_an_unbroken_one(
    folder: Path, dropout: float
) -> None:
    """It was killed after step 6; its checkpoint is of step 4. Dropout masks are a function of the step."""
    config = read(folder / "model/config.json")
    config |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    (folder / "model/config.json").write_text(json.dumps(config))
    before = (folder / INTERRUPTED / "metrics.jsonl").read_text().splitlines()
    assert len(before) == 6 and read(folder / INTERRUPTED / "run.json")["status"] == "running"

    printed = succeed(alone(*COMMANDS["interrupted"]), folder)

    assert f"{INTERRUPTED}/checkpoint-{DONE}" in printed
    after = (folder / INTERRUPTED / "metrics.jsonl").read_text().splitlines()
    assert after[:DONE] == before[:DONE], "the run started again"
    found = losses(folder / INTERRUPTED)
    uninterrupted = EXPECTED["losses_of_the_unbroken_run"]
    rest = EXPECTED["losses_from_step_5_with_dropout_0.1"] if dropout else uninterrupted[DONE:]
    np.testing.assert_allclose(found, [*uninterrupted[:DONE], *rest], rtol=1e-5)
    require_cached(folder)
    record = read(folder / INTERRUPTED / "run.json")
    assert record["status"] == "finished"
    if not dropout:
        assert record["metrics"].pop("loss") > 0  # of every evaluation, which it was not
        assert record["metrics"] == pytest.approx(EXPECTED["metrics_of_the_unbroken_run"], abs=LOGITS)
        assert read(folder / INTERRUPTED / "predictions.json") == read(folder / FINISHED / "predictions.json")


LAUNCHERS = {
    "module": [sys.executable, "-m", "qa_deepspeed"],
    "torchrun": [sys.executable, "-m", "qa_deepspeed.torchrun", "--standalone", "--nproc_per_node", "1", "-m",
                 "qa_deepspeed"],
    "installed script": [sys.executable, "-c", "from qa_deepspeed.cli import main; main()"],
}  # fmt: skip
"""Ways to start the command line. The last one is what the console script of an earlier installation does."""


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_finished_run_has_nothing_to_do(folder: Path, launcher: str) -> None:
    printed = succeed([*LAUNCHERS[launcher], *COMMANDS["finished"]], folder)
    assert "nothing to do" in printed
    assert contents(folder / "runs") == contents(EARLIER / "runs")
    require_cached(folder)


def test_the_record_of_a_finished_run_is_read(folder: Path) -> None:
    record = read(folder / FINISHED / "run.json")
    for name, digest in record["files"].items():
        assert hashlib.sha256((folder / FINISHED / name).read_bytes()).hexdigest() == digest, name
    compared = json.loads(succeed(alone("compare", str(FINISHED), str(FINISHED), "--json"), folder))
    assert compared["scores"]["f1"] == [record["metrics"]["f1"]] * 2
    assert (compared["significance"][0]["total"], compared["significance"][0]["f1_difference"]) == (14, 0)
    asked = ["score", "dev.json", str(FINISHED / "predictions.json"), "--json"]
    scored = json.loads(succeed(alone(*asked), folder))
    for name in ("exact", "f1", "total", "HasAns_f1", "NoAns_f1"):
        assert scored[name] == pytest.approx(record["metrics"][name]), name


def test_a_finished_model_evaluates_to_its_recorded_predictions(folder: Path) -> None:
    succeed(alone(*COMMANDS["evaluate"]), folder)
    require_cached(folder)
    old, new = folder / FINISHED, folder / "evaluated"
    odds, threshold = read(old / "null_odds.json"), read(old / "config.json")["null_score_diff_threshold"]
    assert read(new / "metrics.json")["null_score_diff_threshold"] == threshold
    assert read(new / "null_odds.json") == pytest.approx(odds, abs=LOGITS)
    # The tuned threshold equals the null odds of one question, whose answer depends on rounding.
    sure = [name for name, value in odds.items() if abs(value - threshold) > LOGITS]
    assert len(sure) >= len(odds) - 1
    theirs, ours = read(old / "predictions.json"), read(new / "predictions.json")
    assert {name: ours[name] for name in sure} == {name: theirs[name] for name in sure}
    same_lists(read(new / "nbest_predictions.json"), read(old / "nbest_predictions.json"))


def test_a_finished_model_predicts_what_it_predicted(folder: Path) -> None:
    recorded = (EARLIER / "predicted.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "predicted.jsonl").unlink()
    succeed(alone(*COMMANDS["predict"]), folder)
    lines = (folder / "predicted.jsonl").read_text(encoding="utf-8").splitlines()
    threshold = read(folder / FINISHED / "config.json")["null_score_diff_threshold"]
    for ours, theirs in zip(map(json.loads, lines), map(json.loads, recorded), strict=True):
        assert ours.keys() == theirs.keys()
        same_lists({"nbest": ours.pop("nbest")}, {"nbest": theirs.pop("nbest")})
        if abs(theirs["null_odds"] - threshold) > LOGITS:
            same_entry(ours, theirs)


def same_lists(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Assert that n-best lists have the same texts at the same places, and the same numbers to rounding."""
    assert ours.keys() == theirs.keys()
    for name, entries in theirs.items():
        for mine, yours in zip(ours[name], entries, strict=True):
            same_entry(mine, yours)


def same_entry(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Assert that two answers are equal, their floating-point numbers to rounding.

    Version 0.1 wrote the null score, the sum of both logits, as the null entry's start_logit, and 0 as its end_logit.
    """
    assert ours.keys() == theirs.keys()
    if theirs.get("text") == "" and theirs.get("end_logit") == 0.0:
        ours = {**ours, "start_logit": ours["start_logit"] + ours["end_logit"], "end_logit": 0.0}
    for name, value in theirs.items():
        expected = pytest.approx(value, abs=LOGITS) if isinstance(value, float) else value
        assert ours[name] == expected, (name, theirs)


def test_a_checkpoint_is_exported(folder: Path) -> None:
    """Verified by the logits that the checkpoint recorded."""
    succeed(alone("export", str(INTERRUPTED / f"checkpoint-{DONE}"), "exported"), folder)
    assert read(folder / "exported/run.json")["export"]["largest_difference"] < 1e-5
    assert (folder / "exported/model.safetensors").is_file()


# ---- the feature cache ----


@pytest.fixture
def options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunOptions:
    """The options that the finished run recorded, all of them; the working folder is the copy that they refer to."""
    monkeypatch.chdir(folder)
    return RunOptions(**read(FINISHED / "training_args.json"))


def test_the_cache_is_loaded_without_building(folder: Path, options: RunOptions) -> None:
    expected, facts = FEATURES["train"], model_facts(options)
    counts = expected["counts"] | {EPOCH_ROWS: expected["counts"]["features"]}
    assert look_up_features(options, "train", facts) == (expected["fingerprint"], counts)
    store = load_features(options, "train", facts)
    assert not store.built and store.fingerprint == expected["fingerprint"]
    assert store.counts == expected["counts"] and store.report.to_dict() == expected["report"]
    taken = store.take(np.arange(len(store)))
    rows = np.split(taken.input_ids, taken.row_splits[1:-1])
    assert [row.tolist() for row in rows] == expected["input_ids"]
    assert (taken.start.tolist(), taken.end.tolist()) == (expected["start"], expected["end"])
    assert cached(folder) == cached(EARLIER)


@pytest.mark.parametrize("purpose", FEATURES)
def test_features_built_now_are_those_of_the_earlier_version(folder: Path, options: RunOptions, purpose: Any) -> None:
    """Same columns, and for training the same fingerprint, so that a run whose cache was deleted resumes.

    Where this fails, features have changed: raise FORMAT_VERSION.
    """
    entry = f"{purpose}-{FEATURES[purpose]['fingerprint'][:24]}"
    theirs = {path.name: columns(path) for path in (EARLIER / "cache/features" / entry).glob("*.arrow")}
    shutil.rmtree(folder / "cache")
    store = load_features(options, purpose, model_facts(options))
    assert store.built and (store.fingerprint == FEATURES[purpose]["fingerprint"]) == (purpose == "train")
    ours = {path.name: columns(path) for path in (folder / "cache/features").glob(f"{purpose}-*/*.arrow")}
    assert ours == theirs and len(ours) == 3


def columns(path: Path) -> dict[str, Any]:
    """The content of an Arrow file by column."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all().to_pydict()


# ---- what users import and install ----


def test_public_names_import_and_answer(folder: Path) -> None:
    code = (
        "from qa_deepspeed import QuestionAnswerer, pipeline\n"
        "asked = dict(question='How far above the sea is it?', context='It stands 253 metres above the sea.')\n"
        f"one = QuestionAnswerer.from_pretrained('{FINISHED}', device='cpu')(**asked)\n"
        f"other = pipeline('question-answering', model='{FINISHED}', device=-1)(**asked)\n"
        "assert one == other and set(one) == {'score', 'start', 'end', 'answer'}, (one, other)\n"
    )
    succeed([sys.executable, "-c", code], folder)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, qa_deepspeed; assert not {'torch', 'transformers', 'deepspeed'} & sys.modules.keys()"
    succeed([sys.executable, "-c", code], REPOSITORY)


def test_the_console_script_is_installed_or_can_be() -> None:
    """The entry point of setup.cfg names a function; where the script is installed, it runs."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    name, _, target = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "qa-deepspeed"
    code = f"from {module} import {function}; {function}(['--help'])"
    commands = [[sys.executable, "-c", code], [str(Path(sys.executable).with_name(name)), "--help"]]
    for command in commands[: 1 + Path(commands[1][0]).exists()]:
        assert "train" in succeed(command, REPOSITORY)
