"""`init`: what an audit of the file found, in a run.yaml that `train` reads."""

import json
from pathlib import Path

import pytest
import yaml

from qa_deepspeed.cli.data.sample import write_sample
from qa_deepspeed.cli.main import main
from qa_deepspeed.cli.training.init import USUAL
from qa_deepspeed.config import options
from qa_deepspeed.config.run_options import RunOptions


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.json, dev.json (SQuAD v2.0) and model/, a tiny BERT of 256 positions."""
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, 7, 12, 3)
    return folder


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return int(str(ended.value.code)), shown.out, shown.err


def of_sample(sample: Path, *more: object) -> tuple[object, ...]:
    return "--model_name_or_path", sample / "model", "--train_file", sample / "train.json", *more


def test_a_file_of_a_run_with_what_the_audit_found(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs/mine"
    status, out, err = command(capsys, "init", folder, *of_sample(sample, "--learning_rate", "1e-3"))
    file = folder / "run.yaml"
    assert status == 0 and f"qa-deepspeed train --config {file}" in out, err
    audit_flags = ("--max_seq_length", 256, "--doc_stride", 64, "--version_2_with_negative", "--json")
    _, found_text, _ = command(
        capsys, "audit", sample / "train.json", "--model_name_or_path", sample / "model", *audit_flags
    )
    found = json.loads(found_text)
    written = yaml.safe_load(file.read_text())
    assert {name: written[name] for name in ("max_seq_length", "doc_stride", "doc_stride_is")} == {
        name: found["suggestion"][name] for name in ("max_seq_length", "doc_stride", "doc_stride_is")
    }
    assert written["version_2_with_negative"] is True and found["questions"]["unanswerable"] > 0
    assert written["max_answer_length"] == max(30, found["answers"]["longest"])
    assert written["learning_rate"] == 1e-3 and written["validation_split"] == 0.1 and written["do_eval"] is True
    assert written["output_dir"] == str(folder / "run")
    text = file.read_text()
    assert f"# {found['questions']['unanswerable']:,} of {found['questions']['usable']:,} questions are" in text
    assert f"the longest answer has {found['answers']['longest']} tokens" in text


def test_the_file_round_trips_through_print_config(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(capsys, "init", tmp_path, *of_sample(sample, "--predict_file", sample / "dev.json", "--bf16"))
    file = tmp_path / "run.yaml"
    status, printed, _ = command(capsys, "train", "--config", file, "--print_config")
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    ours = options.build(RunOptions, "train", {}, str(file))
    assert status == 0 and options.build(RunOptions, "train", {}, str(again)) == ours
    assert ours.predict_file == str(sample / "dev.json") and ours.bf16 and not ours.validation_split


def test_its_comments_are_the_defaults(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line without its `# ` sets the option to the value it has already."""
    command(capsys, "init", tmp_path, *of_sample(sample))
    lines = (tmp_path / "run.yaml").read_text().splitlines()
    defaults = [line[2:] for line in lines if any(line.startswith(f"# {name}: ") for name in USUAL)]
    assert {line.split(":")[0] for line in defaults} == set(USUAL)
    uncommented = tmp_path / "all.yaml"
    uncommented.write_text("\n".join([*lines, *defaults]))
    read = [
        options.build(RunOptions, "train", {}, str(file)).to_dict() for file in (tmp_path / "run.yaml", uncommented)
    ]
    assert read[0] == read[1]


def test_given_values_win(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ("--max_seq_length", 192, "--max_answer_length", 9, "--windows_without_answer", "drop")
    status, _, err = command(capsys, "init", tmp_path, *of_sample(sample, *lengths))
    assert status == 0, err
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert (written["max_seq_length"], written["max_answer_length"]) == (192, 9)
    assert written["doc_stride"] < 192 - 64 and written["windows_without_answer"] == "drop"


def test_a_file_whose_questions_all_have_answers(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"id": "a", "question": "Who?", "context": "Ann sings.", "answers": {"text": ["Ann"], "answer_start": [0]}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    flags = ("--model_name_or_path", sample / "model", "--train_file", tmp_path / "rows.jsonl")
    assert command(capsys, "init", tmp_path / "new", *flags)[0] == 0
    assert yaml.safe_load((tmp_path / "new/run.yaml").read_text())["version_2_with_negative"] is False


def test_what_it_refuses(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line each; an earlier file stays as it is."""
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    for arguments, message in (
        ((tmp_path, *of_sample(sample)), "run.yaml exists: remove it"),
        ((tmp_path / "new",), "missing: --model_name_or_path"),
        ((tmp_path / "new", *of_sample(sample)[:2], "--dataset_name", "rajpurkar/squad"), "pass --train_file"),
        ((tmp_path / "new", *of_sample(sample)[:2], "--train_file", "nowhere.json"), "nowhere.json"),
        ((tmp_path / "run.yaml/new", *of_sample(sample)), "cannot write"),
    ):
        status, _, err = command(capsys, "init", *arguments)
        assert status == 2 and message in err and err.count("\n") == 1, err
    assert (tmp_path / "run.yaml").read_text() == "seed: 1\n" and not (tmp_path / "new").exists()
