"""The layers of the package, read off the import statements: the direction of imports, no cycles, and three fences."""

import ast
import functools
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

PACKAGE = REPOSITORY / "qa_deepspeed"
FILES = sorted(PACKAGE.rglob("*.py"))

MAY_IMPORT = {
    "utils": set(),
    "qa": {"utils"},
    "config": {"utils", "qa"},
    "models": {"utils", "qa", "config"},
    "inference": {"utils", "qa", "config", "models"},
    "engine": {"utils", "qa", "config", "models"},
    "runs": {"utils", "qa", "config", "models", "engine"},
    "training": {"utils", "qa", "config", "models", "inference", "engine", "runs"},
    "cli": {"utils", "qa", "config", "models", "engine", "runs", "training", "inference"},
    "torchrun": {"utils", "runs"},
    "__init__": {"training", "inference", "config", "utils"},
    "__main__": {"cli"},
}
"""Entry of the package -> entries that it may import, beside itself."""

QA_MAY_IMPORT = {
    "data": set(),
    "features": {"data"},
    "cache": {"data", "features"},
    "decoding": {"data", "features"},
    "metrics": {"data", "features", "decoding"},
    "report": {"data", "metrics", "decoding", "features"},
}
"""The same inside qa/."""

MOST_ENTRIES, MOST_FILES = 14, 15


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imported(path: Path, only_at_import: bool = False) -> set[str]:
    """Modules that a file imports; `from a import b` counts as a.b where that is a module of this package."""
    tree = tree_of(path)
    nodes = tree.body if only_at_import else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if name in MODULES}
            found |= modules or {node.module}
    return found


def imports_of_package(path: Path, package: str) -> set[str]:
    return {name for name in imported(path) if name == package or name.startswith(package + ".")}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    entry = path.relative_to(PACKAGE).with_suffix("").parts[0]
    used = {name.split(".")[1] for name in imports_of_package(path, "qa_deepspeed") if "." in name}
    assert used <= MAY_IMPORT[entry] | {entry}


@pytest.mark.parametrize("path", sorted((PACKAGE / "qa").rglob("*.py")), ids=module_name)
def test_imports_inside_qa_run_one_way(path: Path) -> None:
    folder = path.relative_to(PACKAGE / "qa").parts[0]
    used = {name.split(".")[2] for name in imports_of_package(path, "qa_deepspeed.qa") if name.count(".") > 1}
    assert used <= QA_MAY_IMPORT.get(folder, set()) | {folder}


def test_the_tables_name_every_folder() -> None:
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES} == set(MAY_IMPORT)
    assert {path.name for path in (PACKAGE / "qa").iterdir() if path.is_dir()} - {"__pycache__"} == set(QA_MAY_IMPORT)


def test_the_top_is_small_and_so_is_every_folder() -> None:
    """No more entries than a reader takes in at once."""
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert len(entries) <= MOST_ENTRIES, sorted(entries)
    for folder in {path.parent for path in FILES}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=module_name)
def test_every_folder_says_what_belongs_in_it(folder: Path) -> None:
    """Three lines: what belongs there, what it may import, where to begin reading."""
    docstring = ast.get_docstring(tree_of(folder / "__init__.py"))
    assert docstring is not None
    assert "Imports: " in docstring
    assert "Start reading: " in docstring


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_deepspeed_is_imported_in_engine_only(path: Path) -> None:
    assert path.is_relative_to(PACKAGE / "engine") or not imports_of_package(path, "deepspeed")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_torch_distributed_is_named_in_dist_only(path: Path) -> None:
    written = any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed" for node in ast.walk(tree_of(path))
    )
    named = written or imports_of_package(path, "torch.distributed")
    assert path == PACKAGE / "utils" / "dist.py" or not named


@pytest.mark.parametrize("path", sorted((PACKAGE / "qa").rglob("*.py")), ids=module_name)
def test_qa_knows_no_ranks(path: Path) -> None:
    """Outside itself, question answering uses the user's error, whole-file writes, the reader of JSON, and locks."""
    others = {name for name in imports_of_package(path, "qa_deepspeed") if not name.startswith("qa_deepspeed.qa")}
    assert others <= {f"qa_deepspeed.utils.{name}" for name in ("errors", "files", "json_files", "locks")}


READ_OTHERS_JSON = {
    "engine.ds_config",
    "qa.data.answers",
    "qa.data.formats",
    "qa.features.encoding",
    "qa.metrics.prediction_files",
    "utils.dist",
    "utils.hosts",
}
"""Modules that parse JSON which users or other programs wrote, or which is in no file."""


@pytest.mark.parametrize("name", MODULES)
def test_our_own_json_is_read_by_one_reader(name: str) -> None:
    """It finds damage; a second reader would end in tracebacks."""
    parses = any(
        isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.load", "json.loads")
        for node in ast.walk(tree_of(MODULES[name]))
    )
    assert parses == (name.removeprefix("qa_deepspeed.") in READ_OTHERS_JSON | {"utils.json_files"})


def reachable(name: str) -> set[str]:
    """Everything that importing a module of this package imports, its own modules and others'."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        for found in imported(MODULES[current], only_at_import=True) if current in MODULES else ():
            if found not in seen:
                seen.add(found)
                waiting.append(found)
    return seen


@pytest.mark.parametrize("name", ["qa.data.reading", "qa.decoding.exact", "qa.metrics.squad", "cli.results.score"])
def test_reading_decoding_and_metrics_import_no_torch(name: str) -> None:
    heavy = {"torch", "transformers", "deepspeed", "datasets"}
    assert not {found.split(".")[0] for found in reachable(f"qa_deepspeed.{name}")} & heavy


@pytest.mark.parametrize("name", MODULES)
def test_imports_make_no_cycle(name: str) -> None:
    assert name not in reachable(name)
