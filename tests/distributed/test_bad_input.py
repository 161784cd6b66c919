"""What users get wrong: one clear line, a non-zero exit, no traceback, nothing lost."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering

from tests.distributed.launching import alone, by_torchrun, flags, run, run_many
from tests.paths import REPOSITORY

pytestmark = pytest.mark.distributed

MISTAKES = [
    ({"model_name_or_path": "nowhere/at-all"}, "nowhere/at-all"),
    ({"train_file": "missing.json"}, "missing.json"),
    ({"model_type": "roberta"}, "contradicts"),
    ({"max_seq_length": 4000}, "positions"),
    ({"doc_stride": 150}, "doc_stride 150"),
    ({"deepspeed_config": "zero9"}, "zero9"),
    ({"fp16": True}, "use --bf16"),
    ({"version_2_with_negative": False}, "--version_2_with_negative"),
    ({"global_batch_size": 12}, "global_batch_size 12"),
    ({"resume_from_checkpoint": "nowhere"}, "nowhere"),
    ({"objective": "marginal"}, "--answers all"),
    ({"max_tokens_per_batch": 100}, "max_tokens_per_batch 100"),
    ({"label_smoothing": 1}, "label_smoothing"),
]


@pytest.fixture(scope="module")
def reported(base_options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the standard error and exit status of each mistake: N.err and N.status."""
    folder: Path = tmp_path_factory.mktemp("mistakes")
    commands = [
        ["train", *flags(**{**base_options, "output_dir": folder / f"run{number}", **change})]
        for number, (change, _) in enumerate(MISTAKES)
    ]
    (folder / "commands.json").write_text(json.dumps(commands))
    done = run(
        [sys.executable, "-m", "tests.distributed.forked", str(folder / "commands.json"), str(folder)], REPOSITORY
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=lambda number: str(MISTAKES[number][1]))
def test_one_clear_line(reported: Path, number: int) -> None:
    stderr = (reported / f"{number}.err").read_text()
    assert (reported / f"{number}.status").read_text() == "2"
    assert MISTAKES[number][1] in stderr and "Traceback" not in stderr
    assert sum(line.startswith("qa-deepspeed: error:") for line in stderr.splitlines()) == 1


def test_a_truncated_file_is_named_with_its_place(base_options: dict[str, object], tmp_path: Path) -> None:
    whole = Path(str(base_options["train_file"])).read_text()
    (tmp_path / "cut.json").write_text(whole[: len(whole) // 2])
    done = run(alone("train", *flags(**{**base_options, "train_file": "cut.json", "output_dir": "run"})), tmp_path)
    assert done.returncode == 2 and "cut.json" in done.stderr and "line" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_of_something_else_is_left_alone(base_options: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = run(alone("train", *flags(**{**base_options, "output_dir": tmp_path})), tmp_path)
    assert done.returncode == 2 and "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_ranks_tell_a_common_mistake_once(base_options: dict[str, object], tmp_path: Path) -> None:
    options = {**base_options, "train_file": "missing.json", "output_dir": tmp_path / "run"}
    done = run(by_torchrun(2, "train", *flags(**options)), tmp_path)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("qa-deepspeed: error:") == 1


def test_a_model_without_a_trained_head_is_not_evaluated(base_options: dict[str, object], tmp_path: Path) -> None:
    kept = ("predict_file", "cache_dir", "version_2_with_negative", "max_seq_length", "doc_stride")
    options = {name: base_options[name] for name in kept}
    bare = AutoModel.from_config(AutoConfig.from_pretrained(str(base_options["model_name_or_path"])))
    bare.save_pretrained(tmp_path / "bare")
    options |= {"model_name_or_path": tmp_path / "bare", "tokenizer_name": base_options["model_name_or_path"]}
    done = run(alone("evaluate", *flags(**options, output_dir=tmp_path / "out")), tmp_path)
    assert done.returncode == 2 and "train it first" in done.stderr


def test_questions_without_a_context_are_answered_with_nothing(base_options: dict[str, object], tmp_path: Path) -> None:
    """The totals stay those of the file, also where no question of it has a context."""
    answer = {"text": "1066", "answer_start": 0}
    qas = [
        {"id": "a", "question": "Who?", "answers": [], "is_impossible": True},
        {"id": "b", "question": "When?", "answers": [answer], "is_impossible": False},
    ]
    blank = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": " ", "qas": qas}]}]}
    (tmp_path / "blank.json").write_text(json.dumps(blank))
    model = tmp_path / "model"
    shutil.copytree(str(base_options["model_name_or_path"]), model)
    AutoModelForQuestionAnswering.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)
    done = run(
        alone(
            "evaluate",
            *flags(
                model_name_or_path=model,
                predict_file="blank.json",
                output_dir="out",
                version_2_with_negative=True,
                max_seq_length=256,
            ),
        ),
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out/predictions.json").read_text()) == {"a": "", "b": ""}
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    names = ("total", "exact", "NoAns_exact", "HasAns_exact")
    assert [metrics[name] for name in names] == [2, 50.0, 100.0, 0.0]


def test_a_loss_that_is_no_number_is_reported_with_its_step_and_questions(
    base_options: dict[str, object], tmp_path: Path
) -> None:
    """On two ranks, at the next save: what was saved before the bad step is good, nothing is saved after it."""
    options = {
        **base_options,
        "learning_rate": 1e25,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "logging_steps": 100,
        "save_steps": 1,
        "output_dir": tmp_path / "run",
    }
    done = run(by_torchrun(2, "train", *flags(**options)), tmp_path)
    printed = done.stdout + done.stderr
    assert done.returncode != 0 and printed.count("qa-deepspeed: error:") == 1
    line = next(line for line in printed.splitlines() if "qa-deepspeed: error:" in line)
    step = int(re.search(r"became (?:nan|inf|-inf|infinite or NaN)[a-z, ]* at step (\d+)", line).group(1))
    batch = json.loads((tmp_path / "run/bad_batch.json").read_text())
    assert batch["step"] == step and batch["questions"][0] in line and "1.000e+25" in line
    numbers = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert numbers == list(range(1, step))


INFINITE_GRADIENTS = {
    f"{stage}_{precision}": {"deepspeed_config": stage, "bf16": precision == "bf16"}
    for stage in ("zero0", "zero1", "zero2", "zero3")
    for precision in ("fp32", "bf16")
}


@pytest.fixture(scope="module")
def infinite_gradients(base_options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each of `INFINITE_GRADIENTS`."""
    folder: Path = tmp_path_factory.mktemp("gradients")
    both = {**base_options, "max_steps": 5, "logging_steps": 100, "save_steps": 1, "gradient_accumulation_steps": 1}
    run_many(
        2,
        {name: {**both, **changes} for name, changes in INFINITE_GRADIENTS.items()},
        folder,
        worker="infinite_gradient_worker",
    )
    return folder


@pytest.mark.parametrize("name", INFINITE_GRADIENTS)
def test_an_infinite_gradient_of_a_finite_loss_ends_the_run_before_anything_is_saved(
    infinite_gradients: Path, name: str
) -> None:
    error = (infinite_gradients / f"{name}.error-0").read_text()
    assert "became infinite or NaN" in error and "at step 3" in error
    assert json.loads((infinite_gradients / name / "bad_batch.json").read_text())["step"] == 3
    numbers = sorted(int(path.name.split("-")[1]) for path in (infinite_gradients / name).glob("checkpoint-*"))
    assert numbers == [1, 2] and not (infinite_gradients / name / "model.safetensors").exists()
