"""The tables of planted faults fit the code, and (slow) the tests notice every fault."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.mutants.planting import Fault, load_faults
from tests.paths import REPOSITORY

FAULTS = load_faults()


def test_every_fault_has_its_line_exactly_once() -> None:
    """After a rename, the table names the new line."""
    texts = {file: (REPOSITORY / file).read_text(encoding="utf-8") for file in {fault.file for fault in FAULTS}}
    problems = []
    for fault in FAULTS:
        try:
            assert fault.planted_in(texts[fault.file]) != texts[fault.file], fault
        except ValueError as error:
            problems.append(str(error))
    assert not problems, "\n".join(problems)


def test_every_fault_has_a_name_of_its_own_and_tests_that_exist() -> None:
    assert len({str(fault) for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        assert (REPOSITORY / fault.tests[0]).exists(), fault


@pytest.mark.parametrize("text", ["x = 2\n", "x = 1\nx = 1\n"])
def test_a_line_that_is_not_there_once_is_an_error(text: str) -> None:
    fault = Fault("table", "name", "file.py", "x = 1", "x = 3", ())
    assert fault.planted_in("    x = 1  # one\n") == "    x = 3  # one\n"
    with pytest.raises(ValueError, match="not once"):
        fault.planted_in(text)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_fault_is_noticed() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.mutants"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
