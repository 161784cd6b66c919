"""Supported versions: the ranges of setup.cfg, and one line where a library lacks a name that is used."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from qa_deepspeed.utils import supported
from qa_deepspeed.utils.errors import UserError
from tests.paths import REPOSITORY


class Base:
    kind = "base"

    @property
    def area(self) -> float:
        return self.width * self._height  # type: ignore[attr-defined, no-any-return]


class Inner(Base):
    def __init__(self) -> None:
        self.width = 1.0

        def later() -> object:
            return getattr(self, "_drawn_late", None)

        self.later = later

    @staticmethod
    def helper(value: object) -> None:
        value.marked = True  # type: ignore[attr-defined]


def test_names_in_a_class_are_its_own_and_those_its_methods_use() -> None:
    names = {"kind", "area", "width", "_height", "later", "_drawn_late", "marked"}
    assert names <= supported.names_used_in(Inner)
    assert supported.missing_names(f"{__name__}:Inner", [*names, "depth"]) == [f"{__name__}:Inner.depth"]


def test_a_missing_module_or_class_is_named() -> None:
    assert supported.missing_names("qa_deepspeed.no_such", ["one"]) == ["qa_deepspeed.no_such"]
    assert supported.missing_names("qa_deepspeed.utils:Nothing", ["one"]) == ["qa_deepspeed.utils:Nothing"]


def test_a_missing_name_is_one_line_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supported, "installed_version", lambda library: "9.9")
    with pytest.raises(UserError) as error:
        supported.require_names("torch", {"torch": ["Tensor", "Tenser"]})
    line = str(error.value)
    assert line.startswith(f"torch 9.9 lacks torch.Tenser; supported: torch {supported.SUPPORTED['torch']}")
    assert "\n" not in line


def requirements(section: str, option: str) -> dict[str, str]:
    """Package -> range of versions in one list of setup.cfg."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    lines = [line.replace(" ", "") for line in config[section][option].splitlines() if line.strip()]
    return {re.split(r"[<>=!~;]", line)[0]: line[len(re.split(r"[<>=!~;]", line)[0]) :] for line in lines}


def test_the_ranges_are_those_of_setup_cfg() -> None:
    declared = requirements("options", "install_requires") | requirements("options.extras_require", "lora")
    assert {name: declared[name] for name in supported.SUPPORTED} == supported.SUPPORTED
    assert requirements("options.extras_require", "test")["peft"] == supported.SUPPORTED["peft"]


def imported_packages(folder: Path) -> set[str]:
    """Packages that the files in a folder import, without the standard library."""
    files = list(folder.rglob("*.py"))
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return (
        {name.split(".")[0] for name in names}
        - sys.stdlib_module_names
        - {"qa_deepspeed", "tests", *(path.stem for path in files)}
    )


def test_everything_imported_is_declared() -> None:
    distributions = {"yaml": "PyYAML", "PIL": "Pillow", "jinja2": "Jinja2"}
    declared = requirements("options", "install_requires").keys()
    extras = {
        name: requirements("options.extras_require", name).keys() for name in ("lora", "xlsx", "onnx", "demo", "test")
    }
    used = declared | extras["lora"] | extras["xlsx"] | extras["onnx"] | extras["demo"]
    for folder, names in (("qa_deepspeed", used), ("tests", used | extras["test"])):
        imported = imported_packages(REPOSITORY / folder)
        assert {distributions.get(name, name) for name in imported} <= set(names), folder


def test_the_tested_versions_are_inside_the_ranges() -> None:
    lines = (REPOSITORY / "launch/constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split(";")[0].strip().split("==") for line in lines if "==" in line.split("#")[0])
    for name, versions in supported.SUPPORTED.items():
        assert SpecifierSet(versions).contains(tested[name]), name
