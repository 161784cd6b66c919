"""Flags and YAML: one dataclass, flags win, unknown names and wrong types are one clear line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qa_deepspeed.cli.main import Parser
from qa_deepspeed.config import options
from qa_deepspeed.config.batch_plan import plan_batches, total_steps
from qa_deepspeed.config.run_options import RunOptions, check_counts
from qa_deepspeed.utils.errors import UserError


def build(given: dict[str, Any], yaml_text: str | None = None, folder: Path | None = None) -> RunOptions:
    path = None
    if yaml_text is not None:
        assert folder is not None
        path = str(folder / "run.yaml")
        Path(path).write_text(yaml_text)
    return options.build(RunOptions, "train", given, path)


CLASSIC_DEFAULTS = {
    "max_seq_length": 384,
    "doc_stride": 128,
    "max_query_length": 64,
    "per_gpu_train_batch_size": 8,
    "per_gpu_eval_batch_size": 8,
    "learning_rate": 5e-5,
    "gradient_accumulation_steps": 1,
    "weight_decay": 0.0,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "warmup_steps": 0,
    "n_best_size": 20,
    "max_answer_length": 30,
    "lang_id": 0,
    "save_steps": 500,
    "seed": 42,
    "null_score_diff_threshold": 0.0,
    "doc_stride_is": "step",
}


def test_defaults_are_those_of_the_classic_script() -> None:
    built = build({}).to_dict()
    assert {name: built[name] for name in CLASSIC_DEFAULTS} == CLASSIC_DEFAULTS


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    built = build({"learning_rate": "3e-5"}, "learning_rate: 1e-4\nseed: 7\nbf16: true\n", tmp_path)
    assert (built.learning_rate, built.seed, built.bf16, built.max_steps) == (3e-5, 7, True, -1)
    assert built.given == {"learning_rate", "seed", "bf16"}


def test_yaml_numbers_with_exponents_are_numbers(tmp_path: Path) -> None:
    assert build({}, "learning_rate: 5e-5\n", tmp_path).learning_rate == 5e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "did you mean 'learning_rate'"),
        ("warmup_ratio: 0.1", "a flag of run_qa.py: --warmup_steps here"),
        ("learning_rate: fast", "must be a number"),
        ("max_steps: 1.5", "must be a whole number"),
        ("bf16: maybe", "must be true or false"),
        ("doc_stride_is: sideways", "must be one of step, overlap"),
        ("- a list", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("max_steps: .inf", "must be a whole number, not inf"),
        ("seed: 1\nbf16: true\nseed: 2", r"'seed' occurs twice \(lines 1 and 3\): keep one"),
        ("{seed: 1, seed: 2}", "'seed' occurs twice"),
        ("model_name_or_path: [a, b]", "must be text"),
        ("output_dir: {a: b}", "must be text"),
        ("train_file: ['a,b.json', c.json]", "a comma separates values"),
        ("max_time: 2024-02-30", "not valid YAML: day is out of range"),
        (f"seed: {'9' * 5000}", "not valid YAML"),
        (f"seed: {'9' * 30}", "'seed' in .* must be at most 9223372036854775807"),
        ('output_dir: "a\\0b"', "'output_dir' in .* holds a null character"),
        ("null_score_diff_threshold: .nan", "must be a number or 'auto', not nan"),
    ],
)
def test_bad_yaml_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build({}, text, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["1.10", "007", "no", "2024-11-28", "1_000", "12:30", "1e3", "null"])
def test_names_that_yaml_takes_for_something_else_are_names(tmp_path: Path, name: str) -> None:
    """By YAML 1.1 these are 1.1, 7, false, a date, 1000 and 750."""
    assert build({}, f"output_dir: {name}", tmp_path).output_dir == (None if name == "null" else name)


def test_yaml_lists_are_several_files(tmp_path: Path) -> None:
    built = build({}, "train_file: [a.json, b.json]\npredict_file:\n- c.json\n", tmp_path)
    assert (built.train_file, built.predict_file) == ("a.json,b.json", "c.json")
    assert built.data_patterns("train") == ("a.json", "b.json")


def test_flags_may_name_several_files() -> None:
    """With blanks or commas between; the next flag ends the list."""
    parser = Parser()
    parser.set_defaults(command="train")
    options.add_arguments(parser, RunOptions, "train")
    for words in (["a.json", "b.json=2"], ["a.json,b.json=2"]):
        given = vars(parser.parse_all(["--train_file", *words, "--predict_file", "c.json", "--seed", "1"]))
        built = build({name: value for name, value in given.items() if name != "command"})
        assert built.data_patterns("train") == ("a.json", "b.json") and built.data_patterns("evaluate") == ("c.json",)
    with pytest.raises(UserError, match="a comma separates values, 'a,b.json' cannot hold one"):
        build({"train_file": ["a,b.json", "c.json"]})


def test_weights_are_those_of_training_files(tmp_path: Path) -> None:
    built = build({"predict_file": "c.json=2"}, "train_file: [a.json=2, 'b*.json=0.5', c.json]", tmp_path)
    assert built.weighted_patterns("train") == {"a.json": 2.0, "b*.json": 0.5, "c.json": 1.0}
    assert built.data_patterns("evaluate") == ("c.json=2",)
    held_out = build({"train_file": "a.json=2", "validation_split": "0.1"})
    assert held_out.data_patterns("evaluate") == ("a.json",)
    with pytest.raises(UserError, match="names a.json with the weights 2 and 3"):
        build({"train_file": "a.json=2,a.json=3"}).data_patterns("train")


def test_a_file_name_may_hold_commas(tmp_path: Path) -> None:
    (tmp_path / "a,b.json").touch()
    built = build({"train_file": str(tmp_path / "a,b.json"), "predict_file": "a,,b"}, "{}", tmp_path)
    assert built.data_patterns("train") == (str(tmp_path / "a,b.json"),)
    assert built.data_patterns("evaluate") == ("a", "b")


def test_many_files_may_be_named(tmp_path: Path) -> None:
    """More characters than the name of one file can have (255), or a path (4,096)."""
    names = [f"part-{number}.json" for number in range(1000)]
    assert build({"train_file": ",".join(names)}, "{}", tmp_path).data_patterns("train") == tuple(names)


def test_a_missing_yaml_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="cannot read the run file"):
        options.build(RunOptions, "train", {}, "nowhere.yaml")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "qa_deepspeed", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "--learning_rat", "1"], "did you mean '--learning_rate'?"),
        (["train", "--max_steps", "many"], "must be a whole number, not 'many'"),
        (["train", "--config", "nowhere.yaml"], "cannot read the run file nowhere.yaml"),
        (["evaluate", "--learning_rate", "1"], "--learning_rate is an option of train, check, not of this command"),
        (["train", "--warmup_ratio=x"], "--warmup_ratio=x, a flag of run_qa.py: --warmup_steps here"),
        (["train", "--lr", "1", "--foo"], "did you mean '--learning_rate'?; unknown argument --foo"),
        (["train", "--deepspeed", "ds.json"], "pass it as --deepspeed_config ds.json"),
    ],
)
def test_the_command_line_answers_mistakes_in_one_line(arguments: list[str], message: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--version_2_with_negative", "FILE"], ("true", None, ["FILE"])),
        (["--version_2_with_negative", "no", "FILE", "--bf16"], ("no", "true", ["FILE"])),
        (["FILE", "--bf16", "--version_2_with_negative=false"], ("false", "true", ["FILE"])),
        (["--bf16", "True", "FILE", "1"], (None, "True", ["FILE", "1"])),
    ],
)
def test_a_boolean_flag_takes_no_value_but_true_or_false(arguments: list[str], expected: tuple) -> None:
    parser = Parser(allow_abbrev=False)
    parser.add_argument("data", nargs="+")
    options.add_arguments(parser, RunOptions, "train")
    parsed = vars(parser.parse_all(arguments))
    assert (parsed.get("version_2_with_negative"), parsed.get("bf16"), parsed["data"]) == expected


def test_help_names_every_command_and_says_what_doc_stride_means() -> None:
    done = command("--help")
    assert done.returncode == 0 and "train" in done.stdout and "evaluate" in done.stdout
    assert "overlap" in command("train", "--help").stdout


def test_the_launchers_rank_flag_is_taken_before_the_command() -> None:
    assert command("--local_rank=1", "--help").returncode == 0


def test_data_dir_holds_the_files_and_the_classic_names() -> None:
    assert build({"data_dir": "d"}).data_file("train") == str(Path("d") / "train-v1.1.json")
    two = build({"data_dir": "d", "version_2_with_negative": "true"})
    assert two.data_file("evaluate") == str(Path("d") / "dev-v2.0.json")
    named = build({"data_dir": "d", "train_file": "a.json,/b/*.json", "predict_file": "c.json"})
    assert named.data_file("train") == f"{Path('d') / 'a.json'},/b/*.json"
    assert named.data_file("evaluate") == str(Path("d") / "c.json")
    assert build({"train_file": "mine.json"}).data_file("train") == "mine.json"


def test_accumulation_follows_from_the_global_batch() -> None:
    plan = plan_batches(rows=4, accumulation=None, global_rows=32, world_size=2)
    assert (plan.gradient_accumulation_steps, plan.global_batch_size) == (4, 32)


@pytest.mark.parametrize("rows,accumulation,global_rows,world_size", [(3, None, 32, 2), (8, 3, 32, 2), (8, None, 4, 2)])
def test_arithmetic_that_does_not_come_out_names_what_would(
    rows: int, accumulation: int | None, global_rows: int, world_size: int
) -> None:
    with pytest.raises(UserError, match=str(global_rows)) as error:
        plan_batches(rows, accumulation, global_rows, world_size)
    if accumulation is None:
        advised = int(str(error.value).split("take global_batch_size ")[1].split()[0])
        assert advised % (rows * world_size) == 0


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("learning_rate", -1e-5, "at least 0"),
        ("learning_rate", float("nan"), "at least 0"),
        ("seed", -1, "at least 0"),
        ("seed", 2**32, "less than 4294967296"),
        ("num_train_epochs", 0.0, "more than 0"),
        ("timeout", 0, "at least 1"),
        ("num_train_epochs", float("nan"), "more than 0"),
        ("warmup_steps", -1, "at least 0"),
        ("save_total_limit", 0, "at least 1"),
        ("logging_steps", 0, "at least 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(name: str, value: float, said: str) -> None:
    check_counts(RunOptions())
    check_counts(RunOptions(max_steps=1, num_train_epochs=0.0))
    with pytest.raises(UserError, match=f"{name} must be {said}"):
        check_counts(RunOptions(**{name: value}))


def test_the_last_partial_batch_of_an_epoch_is_a_step() -> None:
    plan = plan_batches(8, None, None, 2)
    assert total_steps(RunOptions(num_train_epochs=2), 33, plan) == 6
    assert total_steps(RunOptions(num_train_epochs=0.5), 160, plan) == 5
    assert total_steps(RunOptions(max_steps=7), 33, plan) == 7
