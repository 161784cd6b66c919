"""The tables of faults, and how one is planted in a copy of this checkout."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.paths import REPOSITORY

TABLES = Path(__file__).parent / "faults"


@dataclass(frozen=True)
class Fault:
    """A change of one line of `file` that `tests` (arguments of pytest) must notice.

    `before` is a part of the line that stands in the file exactly once, so that a table survives reformatting.
    """

    table: str
    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.table}: {self.name}"

    def planted_in(self, text: str) -> str:
        """The file's text with the fault.

        Raises:
            ValueError: the line is not there, or more than once.
        """
        found = sum(line.count(self.before) for line in text.splitlines())
        if found != 1:
            raise ValueError(f"{self}: '{self.before}' stands {found} times in {self.file}, not once")
        return text.replace(self.before, self.after)


def load_faults(tables: Path = TABLES) -> list[Fault]:
    """All faults of the tables, each a YAML list of files with their faults; a fault may name tests of its own."""
    return [
        Fault(
            path.stem,
            fault["name"],
            entry["file"],
            fault["before"],
            fault["after"],
            tuple(shlex.split(fault.get("tests") or entry["tests"])),
        )
        for path in sorted(tables.glob("*.yaml"))
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))
        for fault in entry["faults"]
    ]


def copy_checkout(target: Path) -> None:
    """Copy what git tracks here or would track, as it is now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.split("\0"):
        source = REPOSITORY / name
        if name and source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
