"""Private names of DeepSpeed, Transformers, peft and torch stand in the compat files only, and each is checked."""

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from qa_deepspeed.engine import config_check, deepspeed_compat, monitors
from qa_deepspeed.engine.checkpoints import loss_scale
from qa_deepspeed.engine.nvme import nvme_compat
from qa_deepspeed.models import torch_compat, transformers_compat
from qa_deepspeed.utils import dist, supported
from qa_deepspeed.utils.errors import UserError
from tests.paths import REPOSITORY

PACKAGE = REPOSITORY / "qa_deepspeed"
COMPAT = {
    PACKAGE / "engine/deepspeed_compat.py": {**deepspeed_compat.NAMES, **deepspeed_compat.TORCH_NAMES},
    PACKAGE / "engine/checkpoints/loss_scale.py": loss_scale.NAMES,
    PACKAGE / "engine/nvme/nvme_compat.py": nvme_compat.NAMES,
    PACKAGE / "engine/config_check.py": config_check.NAMES,
    PACKAGE / "engine/monitors.py": monitors.NAMES,
    PACKAGE / "models/transformers_compat.py": {
        place: " ".join(names)
        for place, names in {**transformers_compat.TRANSFORMERS_NAMES, **transformers_compat.PEFT_NAMES}.items()
    },
    PACKAGE / "models/torch_compat.py": torch_compat.NAMES,
    PACKAGE / "utils/dist.py": dist.NAMES,
}
"""Compat file -> module or class of the library -> names used of it."""

PUBLIC = {"PreTrainedModel", "DeepSpeedConfig"}
"""Of the names in the tables those that the libraries document."""

ALLOWED = {
    "_actions",  # argparse
    "_replace",  # documented: of a named tuple
    "_exit",  # documented: of os
}
"""Names with an underscore of objects that are not of this package."""

FILES = sorted(set(PACKAGE.rglob("*.py")) - set(COMPAT))


def names_in(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, name, whether it is one's own: of self, cls or this package) of attributes, imports and texts."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            yield node.lineno, node.attr, own
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, alias.name, (node.module or "").startswith("qa_deepspeed")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value, True


def names_defined() -> set[str]:
    """Functions, classes, variables and attributes of this package."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and path not in COMPAT:
                found.add(node.attr)
    return found


OWN = names_defined()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_stand_in_the_compat_files_only(path: Path) -> None:
    private = {name for table in COMPAT.values() for names in table.values() for name in names.split()} - PUBLIC
    for line, name, own in names_in(path):
        underscore = re.match(r"_(?!_)", name) and not own and name not in OWN
        assert name not in private and (not underscore or name in ALLOWED), f"{path}:{line}: {name}"


@pytest.mark.parametrize("path", COMPAT, ids=lambda path: path.stem)
def test_the_tables_list_what_the_compat_files_use(path: Path) -> None:
    """Every name with an underscore of another object, and no name in a table that is not used."""
    listed = {name for names in COMPAT[path].values() for name in names.split()}
    text = path.read_text(encoding="utf-8")
    used = {name for _, name, own in names_in(path) if re.match(r"_(?!_)", name) and not own}
    assert used <= listed
    for name in listed:
        assert text.count(name) > 1, f"{name} is listed and not used"


CHECKS: list[tuple[str, Callable[[], None], dict[str, str]]] = [
    ("deepspeed", deepspeed_compat.check_supported, deepspeed_compat.NAMES),
    ("deepspeed", loss_scale.check_supported, loss_scale.NAMES),
    ("deepspeed", nvme_compat.check_supported, nvme_compat.NAMES),
    ("torch", deepspeed_compat.check_supported, deepspeed_compat.TORCH_NAMES),
    (
        "transformers",
        transformers_compat.check_supported,
        {place: " ".join(names) for place, names in transformers_compat.TRANSFORMERS_NAMES.items()},
    ),
    (
        "peft",
        transformers_compat.check_peft_supported,
        {place: " ".join(names) for place, names in transformers_compat.PEFT_NAMES.items()},
    ),
    ("torch", torch_compat.check_supported, torch_compat.NAMES),
    ("torch", dist.check_supported, dist.NAMES),
]
"""Library, function that checks the names at start, names."""

REMOVED = [
    pytest.param(library, check, place, name, id=f"{place}.{name}")
    for library, check, table in CHECKS
    for place, names in table.items()
    for name in names.split()
]


@pytest.mark.parametrize(("library", "check", "place", "name"), REMOVED)
def test_a_missing_name_ends_the_start_in_one_line(
    library: str, check: Callable[[], None], place: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a version of the library without that name."""
    real = supported.missing_names

    def missing(where: str, expected: Iterable[str]) -> list[str]:
        return real(where, [f"no_{each}" if (where, each) == (place, name) else each for each in expected])

    monkeypatch.setattr(supported, "missing_names", missing)
    with pytest.raises(UserError) as error:
        getattr(check, "__wrapped__", check)()
    line = str(error.value)
    assert f"lacks {place}.no_{name}; supported: {library} {supported.SUPPORTED[library]}" in line
    assert "\n" not in line


@pytest.mark.parametrize("check", [check for _, check, _ in CHECKS])
def test_the_installed_versions_have_all_names(check: Callable[[], None]) -> None:
    check()


def test_a_checkpoint_key_of_another_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deepspeed_compat.CHECKPOINT_KEYS, "PARAM_SHAPES", "parameter_shapes")
    with pytest.raises(UserError, match=r"uses another checkpoint key than 'parameter_shapes' \(PARAM_SHAPES\)"):
        deepspeed_compat.check_supported.__wrapped__()


def test_a_message_of_another_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_compat, "LOSS_SCALE_EXHAUSTED", "no such message")
    with pytest.raises(UserError, match="has no message 'no such message'"):
        deepspeed_compat.check_supported.__wrapped__()


def test_a_reader_of_other_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_compat, "READER_ARGUMENTS", ["model", "files"])
    with pytest.raises(UserError, match=r"has another signature for reading weights \(model, state_dict"):
        transformers_compat.check_supported.__wrapped__()
