"""The options of calls from Python: what wins, what is checked, what `RunOptions` shows of itself."""

import dataclasses
from pathlib import Path

import pytest

from qa_deepspeed.config.run_arguments import options_of_call
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.utils.errors import UserError

NEEDED = {"model_name_or_path": "m", "train_file": "t.json", "output_dir": "o"}


def test_settings_win_over_the_object_which_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 1\nmax_steps: 1\nwarmup_steps: 1\n")
    found = options_of_call("train", RunOptions(**NEEDED, seed=2, max_steps=2), file, {"seed": 3})
    assert (found.seed, found.max_steps, found.warmup_steps) == (3, 2, 1)
    assert found.given == {*NEEDED, "seed", "max_steps", "warmup_steps"}


def test_values_of_python_are_taken() -> None:
    files = [Path("a.json"), "b.json=2"]
    found = options_of_call("train", None, None, {**NEEDED, "train_file": files, "output_dir": Path("runs/one")})
    assert (found.train_file, found.output_dir) == ("a.json,b.json=2", "runs/one")
    theirs = {"per_device_train_batch_size": 4, "eval_strategy": "epoch", "validation_file": ("p.json",)}
    found = options_of_call("train", None, None, {**NEEDED, **theirs})
    assert (found.per_gpu_train_batch_size, found.eval_steps, found.predict_file) == (4, "epoch", "p.json")


def test_a_default_that_is_passed_by_name_is_given() -> None:
    """An evaluation takes what is not given from the model's config."""
    needed = {"model_name_or_path": "m", "predict_file": "p.json"}
    assert "max_seq_length" in options_of_call("evaluate", None, None, {**needed, "max_seq_length": 384}).given
    assert options_of_call("evaluate", RunOptions(**needed, max_seq_length=384), None, {}).given == set(needed)


def test_an_evaluation_ignores_options_of_a_training_in_the_object_only() -> None:
    run = RunOptions(**NEEDED, predict_file="p.json", learning_rate=1e-3)
    assert options_of_call("evaluate", run, None, {}).learning_rate == RunOptions().learning_rate
    with pytest.raises(UserError, match="unknown option 'learning_rate' in the arguments"):
        options_of_call("evaluate", run, None, {"learning_rate": 1e-3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 1e-3}, "unknown option 'lr' in the arguments; did you mean 'learning_rate'?"),
        ({"learning_rate": "high"}, "option 'learning_rate' in the arguments must be a number, not 'high'"),
        ({"learning_rate": None}, "option 'learning_rate' in the arguments must be a number, not None"),
        ({"answers": "some"}, "option 'answers' in the arguments must be one of first, all, not 'some'"),
        ({"output_dir": ("a", "b")}, "option 'output_dir' in the arguments must be text, not ('a', 'b')"),
        ({"do_eval": True}, "missing: predict_file (or validation_split 0.1)"),
    ],
)
def test_mistakes_are_one_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        options_of_call("train", None, None, {**NEEDED, **settings})
    assert str(caught.value) == message


def test_options_show_what_was_set() -> None:
    assert repr(RunOptions()) == "RunOptions()"
    run = RunOptions(learning_rate=1e-3, output_dir="runs/one")
    assert repr(run) == "RunOptions(learning_rate=0.001, output_dir='runs/one')"
    given = dataclasses.replace(run, seed=42, given=frozenset({"seed"}))
    assert repr(given) == "RunOptions(learning_rate=0.001, seed=42, output_dir='runs/one')"
