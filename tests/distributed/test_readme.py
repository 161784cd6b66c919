"""The README's commands, run as written on the generated corpus; those that are not are listed with their reason."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.distributed.launching import free_port, run
from tests.paths import REPOSITORY

pytestmark = pytest.mark.distributed

NOT_RUN_HERE = {
    "launch/quickstart.sh": "makes an environment; tests/distributed/test_quickstart.py runs what it runs",
    "launch/test.sh": "runs this test",
    "pip install": "tests/unit/test_package.py builds and installs the wheel",
    "qa-deepspeed plan": "names a model of the hub; tests/unit/cli/test_plan.py runs it",
    "qa-deepspeed check": "needs a hosts file and other machines; tests/unit/cli/test_check.py runs it",
    "HOSTFILE=hosts launch/multinode.sh": "needs other machines; tests/multinode runs it",
}


def commands() -> list[list[str]]:
    """The command lines of the README's bash blocks, continued lines joined, comments dropped."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_every_command_of_the_readme_works(sample: Path, tmp_path: Path) -> None:
    """In order, in one folder; the hub's model is the tiny one of the sample, and training stops after two steps. The
    command of the model card repeats the training.
    """
    shutil.copytree(sample / "model", tmp_path / "bert-base-uncased")
    for name in ("train", "dev"):
        shutil.copy(sample / f"{name}.json", tmp_path / f"{name}-v2.0.json")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "home.md").write_text("I live in a lighthouse near Weimar.")
    ran = 0
    for words in commands():
        if words[0] in NOT_RUN_HERE or " ".join(words[:2]) in NOT_RUN_HERE:
            assert not words[0].startswith("launch/") or (REPOSITORY / words[0]).is_file()
            continue
        if words[0] == "deepspeed":
            words[1:1] = ["--master_port", free_port()]
        if "train" in words or "evaluate" in words:
            words += ["--max_seq_length", "256"]  # the tiny model has fewer positions
        if "train" in words:
            words += ["--max_steps", "2"]
        if {"audit", "prepare"} & set(words):
            words += ["--max_seq_length", "256"]
        if words[0] == "qa-deepspeed":
            words[:1] = ["python", "-m", "qa_deepspeed"]
        done = run(words, tmp_path)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        ran += 1
    assert ran == 7
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) > 10 and all("answer" in row and "score" in row for row in answers)
    assert (tmp_path / "runs/mine/predictions.json").read_bytes() == (
        tmp_path / "runs/mine-again/predictions.json"
    ).read_bytes()
    (of_card,) = re.findall(r"```bash\n(.*?)```", (tmp_path / "runs/mine/README.md").read_text(), re.DOTALL)
    words = shlex.split(of_card)
    done = run([words[0], "--master_port", free_port(), *words[1:]], tmp_path)
    assert done.returncode == 0, f"{of_card}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    for name in ("predictions.json", "model.safetensors"):
        assert (tmp_path / "OUTPUT_DIR" / name).read_bytes() == (tmp_path / "runs/mine" / name).read_bytes(), name


CLASSIC_FLAGS = (
    "model_type model_name_or_path config_name tokenizer_name cache_dir output_dir data_dir train_file "
    "predict_file version_2_with_negative null_score_diff_threshold max_seq_length doc_stride "
    "max_query_length do_train do_eval evaluate_during_training do_lower_case per_gpu_train_batch_size "
    "per_gpu_eval_batch_size learning_rate gradient_accumulation_steps weight_decay adam_epsilon "
    "max_grad_norm num_train_epochs max_steps warmup_steps n_best_size max_answer_length verbose_logging "
    "lang_id logging_steps save_steps eval_all_checkpoints no_cuda overwrite_output_dir overwrite_cache "
    "seed local_rank fp16 fp16_opt_level threads server_ip server_port "
)


def test_every_classic_flag_stands_in_the_table() -> None:
    """The flags of the classic script, each in the migration table and on the command line."""
    table = (REPOSITORY / "launch/MIGRATING.md").read_text()
    assert not [flag for flag in CLASSIC_FLAGS.split() if f"`{flag}`" not in table]
    listed = run(["python", "-m", "qa_deepspeed", "train", "--help"], REPOSITORY).stdout
    assert not [flag for flag in CLASSIC_FLAGS.split() if f"--{flag} " not in listed]


def test_every_shipped_config_stands_in_the_table() -> None:
    table = (REPOSITORY / "ds_configs/README.md").read_text()
    names = [path.stem for path in (REPOSITORY / "ds_configs").glob("*.json")]
    assert len(names) >= 6 and not [name for name in names if f"| `{name}`" not in table]
