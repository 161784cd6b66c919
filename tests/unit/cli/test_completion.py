"""Completion on the tab key, by the script in a bash process."""

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qa_deepspeed.cli.completion import script
from qa_deepspeed.cli.main import COMMANDS, main

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")

Complete = Callable[..., list[str]]


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Complete:
    """What bash offers for the last of some words."""
    folder = tmp_path_factory.mktemp("completion")
    file = folder / "qa-deepspeed"
    file.write_text(script())

    def offered(*words: str) -> list[str]:
        typed = " ".join(map(shlex.quote, ("qa-deepspeed", *words)))
        called = f". {file}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _qa_deepspeed"
        shown = 'printf "%s\\n" "${COMPREPLY[@]}"'
        bash = ["bash", "-uec", f"{called}; {shown}"]
        done = subprocess.run(bash, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout.split()

    return offered


def test_commands_are_offered(complete: Complete) -> None:
    assert complete("ev") == ["evaluate"]
    assert {*COMMANDS, "help"} <= set(complete(""))
    assert complete("help", "ex") == ["export"]


def test_flags_of_the_command_are_offered(complete: Complete) -> None:
    assert complete("train", "--learning") == ["--learning_rate"]
    assert complete("audit", "data.json", "--learning") == []
    assert complete("train", "--bf16", "--print_") == ["--print_config", "--print_schema"]
    assert complete("sample", "-") == ["--dev_articles", "--help", "--seed", "--train_articles"]


def test_known_values_of_a_flag_are_offered(complete: Complete) -> None:
    assert complete("train", "--decode_mode", "") == ["exact", "hf", "classic"]
    assert complete("train", "--bf16", "t") == ["true"]
    assert complete("train", "--eval_steps", "") == ["epoch"]
    assert complete("train", "--max_seq_len", "") == complete("train", "--train_file", "") == []  # numbers; files
    assert complete("completion", "") == ["bash"]


def test_the_command_prints_the_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """And bash registers it: where the function offers nothing, file names are offered."""
    with pytest.raises(SystemExit) as ended:
        main(["completion", "bash"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and printed == script()
    registered = subprocess.run(["bash", "-c", f"{printed}\ncomplete -p qa-deepspeed"], capture_output=True, text=True)
    assert registered.stdout == "complete -o default -F _qa_deepspeed qa-deepspeed\n"
