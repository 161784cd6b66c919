"""Commands in the running text of the documents: a test that is named here runs each, or a reason says why none does.

The commands of README.md's bash blocks are run as written by tests/distributed/test_readme.py.
"""

import dataclasses
import re

import pytest

from qa_deepspeed.config.migration import ALIASES, MOVED, SHORT_NAMES, STRATEGIES
from qa_deepspeed.config.run_options import RunOptions
from tests.paths import REPOSITORY

HISTORY = ("tests/bench/history/version_0_1.md", "tests/bench/history/h100_baseline.md")
DOCUMENTS = (
    "README.md",
    "ds_configs/README.md",
    "launch/README.md",
    "launch/MIGRATING.md",
    "qa_deepspeed/README.md",
    "tests/README.md",
    "tests/bench/README.md",
    *HISTORY,
)
MOST_WORDS = 1500
"""Of README.md: a newcomer reads it in one sitting."""

COMMAND = re.compile(r"launch/\S+\.(sh|sbatch)\b|^qa-deepspeed \w|^kubectl |\b(torchrun|python|deepspeed) (-|tests)")
"""What makes a span of code a command."""

RUN_BY = {
    r"launch/local\.sh": "tests/unit/launch/test_scripts.py",
    r"launch/multinode\.sh": "tests/multinode/test_hosts.py",
    r"launch/slurm\.sbatch": "tests/unit/launch/test_scripts.py",
    r"launch/quickstart\.sh": "tests/distributed/test_quickstart.py",
    r"launch/kubernetes\.yaml": "tests/unit/launch/test_kubernetes.py",
    r"qa_deepspeed\.torchrun": "tests/distributed/test_torchrun.py",
    r"^qa-deepspeed (train|evaluate)": "tests/distributed/test_command_line.py",
    r"^qa-deepspeed sweep": "tests/distributed/test_sweep.py",
    r"^qa-deepspeed compare": "tests/unit/cli/test_compare.py",
    r"^qa-deepspeed export": "tests/distributed/checkpoint_scenes.py",
    r"^qa-deepspeed demo": "tests/browser/test_demo_page.py",
    r"^qa-deepspeed predict": "tests/unit/cli/test_predict.py",
    r"^qa-deepspeed prepare": "tests/unit/cli/test_prepare.py",
    r"^qa-deepspeed plan": "tests/unit/cli/test_plan.py",
    r"^qa-deepspeed audit": "tests/unit/cli/test_audit.py",
    r"^qa-deepspeed check": "tests/unit/cli/test_check.py",
    r"^qa-deepspeed init": "tests/unit/cli/test_init.py",
    r"^qa-deepspeed completion": "tests/unit/cli/test_completion.py",
    r"pytest -s (tests/distributed/test_(plan_memory|loading)\.py|tests/multinode)": (
        "tests/distributed/test_plan_memory.py"
    ),
}
"""Pattern of a command -> the test that runs what it runs."""

NOT_RUN = {
    r"^launch/test\.sh( tests/unit)?$": "runs these tests",
    r"tests/bench/\w+\.py": "a measurement: takes minutes and a quiet machine",
    r"^(OMP_NUM_THREADS=1 )?deepspeed .* en-v[12]-train\.json": "a measurement of many minutes on data of its own",
    r"(launch/test\.sh|pytest -s) -m gpu": "needs a GPU",
    r"-m debugpy": "another program's",
}
"""Pattern of a command -> why no test runs it."""


def commands(document: str) -> list[str]:
    """The commands between backticks, outside of fenced blocks."""
    text = re.sub(r"```.*?```", "", (REPOSITORY / document).read_text(), flags=re.DOTALL)
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))
    return [span for span in spans if COMMAND.search(span)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_run_by_a_test_or_has_a_reason(document: str) -> None:
    found = commands(document)
    assert found or document in HISTORY
    assert [one for one in found if not any(re.search(known, one) for known in RUN_BY | NOT_RUN)] == []


def test_nothing_is_listed_that_no_document_says() -> None:
    said = [one for document in DOCUMENTS for one in commands(document)]
    assert [known for known in RUN_BY | NOT_RUN if not any(re.search(known, one) for one in said)] == []
    assert [test for test in RUN_BY.values() if not (REPOSITORY / test).is_file()] == []


RUN_QA = (
    "model_name_or_path config_name tokenizer_name cache_dir model_revision token trust_remote_code dataset_name "
    "dataset_config_name train_file validation_file test_file overwrite_cache preprocessing_num_workers max_seq_length "
    "pad_to_max_length max_train_samples max_eval_samples max_predict_samples version_2_with_negative "
    "null_score_diff_threshold doc_stride n_best_size max_answer_length"
)
"""The flags that run_qa.py itself declares, beside those of TrainingArguments."""


def test_every_flag_of_run_qa_is_in_the_migration_table() -> None:
    """Beside what replaces it; and the error for a flag that is not accepted names the same."""
    section = (REPOSITORY / "launch/MIGRATING.md").read_text().split("## From run_qa.py")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)(?: FILE)?`", section))
    ours = {field.name for field in dataclasses.fields(RunOptions)}
    assert not {*RUN_QA.split(), *MOVED, *ALIASES, *STRATEGIES} - named
    assert set(RUN_QA.split()) <= ours | MOVED.keys() | ALIASES.keys()
    assert not ours & (MOVED.keys() | ALIASES.keys())
    assert set(ALIASES.values()) | set(SHORT_NAMES.values()) | set(STRATEGIES.values()) <= ours
    same = set(re.findall(r"`(\w+)`", section.split("A file of arguments")[0]))
    assert len(same) > 25 and not same - ours


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_is_there(document: str) -> None:
    """Paths between backticks, seen from the repository or from the package, and the targets of links."""
    folders = "qa_deepspeed|launch|tests|ds_configs|" + "|".join(
        path.name for path in (REPOSITORY / "qa_deepspeed").iterdir() if path.is_dir()
    )
    text = (REPOSITORY / document).read_text()
    paths = set(re.findall(rf"`((?:{folders})/[\w./-]*\w)/?(?:[ `])", text))
    missing = [
        path
        for path in sorted(paths - {"runs/mine"})  # an output folder
        if not (REPOSITORY / path).exists() and not (REPOSITORY / "qa_deepspeed" / path).exists()
    ]
    links = re.findall(r"\]\(([\w./]+\.md)(?:#[\w.-]+)?\)", text)
    missing += [link for link in links if not (REPOSITORY / document).parent.joinpath(link).exists()]
    assert missing == []


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().split()) <= MOST_WORDS


def test_the_map_has_every_file() -> None:
    """The tree in qa_deepspeed/README.md: every module, and nothing that is not there."""
    text = (REPOSITORY / "qa_deepspeed/README.md").read_text()
    tree = text.split("```\nqa_deepspeed/\n")[1].split("```")[0]
    listed, folders = set(), ["qa_deepspeed"]
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name.rstrip("/")]
        if name.endswith(".py"):
            listed.add("/".join(folders))
            assert len(line.split()) > 1, f"{name} has no comment"
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "qa_deepspeed").rglob("*.py")}
    assert listed == {name for name in modules if not name.endswith(("__init__.py", "__main__.py"))}
