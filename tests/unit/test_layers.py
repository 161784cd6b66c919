"""The three fences of the house, the direction of imports, and no cycles: read off the import statements."""

import ast
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

PACKAGE = REPOSITORY / "qa_deepspeed"
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported(path: Path, only_at_import: bool = False) -> set[str]:
    """Modules that a file imports; `from a import b` counts as a.b where that is a module of ours."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if only_at_import else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in MODULES} or {node.module}
    return found


def names(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imported(path))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_deepspeed_is_imported_in_engine_only(path: Path) -> None:
    assert path.is_relative_to(PACKAGE / "engine") or not names(path, "deepspeed")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_torch_distributed_is_named_in_dist_only(path: Path) -> None:
    written = any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )
    assert path == PACKAGE / "dist.py" or not (written or names(path, "torch.distributed"))


@pytest.mark.parametrize("path", sorted((PACKAGE / "qa").glob("*.py")), ids=module_name)
def test_qa_knows_neither_rank_nor_engine(path: Path) -> None:
    for forbidden in ("qa_deepspeed.dist", "qa_deepspeed.engine", "qa_deepspeed.train", "qa_deepspeed.evaluate"):
        assert not names(path, forbidden)


JOINING = {"qa_deepspeed.train", "qa_deepspeed.training_loop", "qa_deepspeed.evaluate"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_train_and_evaluate_join_qa_and_deepspeed(path: Path) -> None:
    name = module_name(path)
    if name not in JOINING:
        assert not (names(path, "qa_deepspeed.qa") and names(path, "qa_deepspeed.engine"))


def reachable(name: str) -> set[str]:
    """Everything that importing a module of ours imports, ours and others'."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        for found in imported(MODULES[current], only_at_import=True) if current in MODULES else ():
            if found not in seen:
                seen.add(found)
                waiting.append(found)
    return seen


@pytest.mark.parametrize("name", ["readers", "decode", "metrics", "score"])
def test_reading_decoding_and_metrics_import_no_torch(name: str) -> None:
    heavy = {"torch", "transformers", "deepspeed", "datasets"}
    assert not {found.split(".")[0] for found in reachable(f"qa_deepspeed.qa.{name}")} & heavy


@pytest.mark.parametrize("name", MODULES)
def test_imports_make_no_cycle(name: str) -> None:
    assert name not in reachable(name)
