"""The JSON schema of run YAML: it takes what `train` takes, and refuses what `train` refuses."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qa_deepspeed.cli.main import main
from qa_deepspeed.config import options
from qa_deepspeed.config.migration import ALIASES, STRATEGIES
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.config.schema import run_schema
from qa_deepspeed.utils.errors import UserError
from tests.paths import REPOSITORY

RUN_FILES = [REPOSITORY / "launch/quickstart.yaml", *sorted((REPOSITORY / "launch/examples").glob("*.yaml"))]


def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="no jsonschema (extra [test])")
    return jsonschema.validators.validator_for(run_schema("train"))


def is_valid(settings: dict[str, Any]) -> bool:
    valid: bool = validator()(run_schema("train")).is_valid(settings)
    return valid


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_print_schema_has_every_option_with_help_and_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--print_schema"])
    printed = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and printed == run_schema(command) and printed["additionalProperties"] is False
    fields = {field.name: field for field in options.fields_of(RunOptions, command)}
    aliases = {alias for alias, name in (ALIASES | STRATEGIES).items() if name in fields}
    assert set(printed["properties"]) == {*fields, *aliases}
    for name, field in fields.items():
        found = printed["properties"][name]
        assert found["description"] == field.metadata["help"]
        assert found.get("default") == field.default
        if field.metadata["choices"] and field.default is not None:
            assert found["enum"] == list(field.metadata["choices"])


def test_the_schema_is_one() -> None:
    validator().check_schema(run_schema("train"))
    validator().check_schema(run_schema("evaluate"))


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_shipped_run_files_are_valid(path: Path) -> None:
    settings = yaml.safe_load(path.read_text())
    assert is_valid(settings)
    assert not is_valid(settings | {"learning_rat": 1e-5})


def values() -> Iterator[tuple[str, Any]]:
    """Right and wrong values of options of every kind."""
    yield from (("seed", 3), ("seed", 3.5), ("seed", "three"), ("seed", True), ("seed", None), ("learning_rate", 1))
    yield from (("learning_rate", "high"), ("bf16", True), ("bf16", "perhaps"), ("bf16", 7), ("answers", "all"))
    yield from (("answers", "some"), ("eval_steps", 0.5), ("eval_steps", "epoch"), ("eval_steps", "often"))
    yield from (("eval_steps", None), ("train_file", "a.json"), ("train_file", ["a.json", "b.json=2"]))
    yield from (("output_dir", ["a"]), ("output_dir", {"a": 1}), ("output_dir", None))
    yield from (("output_dir", 7), ("max_seq_len", 128), ("max_seq_len", "long"), ("eval_strategy", "steps"))
    yield from (("report_to", "tensorboard, wandb"), ("report_to", ["wandb", "none"]), ("report_to", "wand"))
    yield from (("eval_strategy", "often"), ("lora_rank", None), ("save_steps", "epoch"))


@pytest.mark.parametrize(("name", "value"), list(values()))
def test_it_takes_and_refuses_the_values_that_train_does(name: str, value: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({name: value}))
    try:
        options.build(RunOptions, "train", {}, str(file))
    except UserError:
        taken = False
    else:
        taken = True
    assert is_valid({name: value}) is taken
