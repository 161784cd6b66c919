"""Our own JSON files are read back as they were written, or named as damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_deepspeed.utils.files import write_json
from qa_deepspeed.utils.json_files import (
    ANYTHING,
    CHECKSUM,
    NUMBER,
    DamagedFile,
    fault_of,
    parse_json,
    read_json,
    sealed,
)
from tests.unit.damage import DAMAGE

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200)
@given(value=st.dictionaries(st.text(max_size=5), VALUES, max_size=4))
def test_what_is_sealed_and_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]
) -> None:
    """Also half surrogate pairs, which come from names that are not UTF-8."""
    value.pop(CHECKSUM, None)
    path = tmp_path_factory.mktemp("json") / "one.json"
    write_json(path, sealed(value))
    assert read_json(path, {str: ANYTHING}) == value
    write_json(path, value)
    assert read_json(path, {str: ANYTHING}) == value, "files of earlier versions have no checksum"


def test_tuples_and_numbers_as_keys_are_sealed_as_they_come_back() -> None:
    written = json.dumps(sealed({"rows": (1, 2), "by length": {10: 1.5, 9: None}})).encode()
    assert parse_json(written, ANYTHING, "file") == {"rows": [1, 2], "by length": {"10": 1.5, "9": None}}


@settings(deadline=None, max_examples=400)
@given(damage=DAMAGE)
def test_damage_is_found_or_changes_nothing(damage: Callable[[bytes], bytes]) -> None:
    value = {"counts": {"rows": 123456, "steps": 7}, "names": ["one", "two"], "rate": 0.5, "none": None}
    content = json.dumps(sealed(value), indent=1).encode()
    try:
        found = parse_json(damage(content), {"counts": {str: int}, "names": [str], "rate": NUMBER}, "file")
    except DamagedFile as error:
        assert str(error).startswith("file: ") and "\n" not in str(error)
    else:
        # Only the checksum's own key can change: it is then a key that nobody reads.
        assert {key: found[key] for key in value} == value


@pytest.mark.parametrize(
    ("value", "shape", "fault"),
    [
        (5, int, None),
        (True, int, "int is expected, not bool"),
        (True, bool, None),
        (True, ANYTHING, None),
        (None, (str, type(None)), None),
        ("a", NUMBER, "int/float is expected, not str"),
        ([1, "a"], [int], "1: int is expected, not str"),
        ({}, [int], "a list is expected"),
        ([], {"a": int}, "an object is expected"),
        ({"b": 1}, {"a": int}, "'a' is missing"),
        ({"b": 1}, {"a?": int}, None),
        ({"a": None}, {"a?": int}, "a: int is expected, not NoneType"),
        ({"a": 1, "b": "x"}, {str: int, "a": int}, "b: int is expected, not str"),
        ({"b": 1}, {str: int, "a": int}, "'a' is missing"),
        ({"a": [{"b": 1.5}]}, {"a": [{"b": int}]}, "a: 0: b: int is expected, not float"),
    ],
)
def test_shapes(value: Any, shape: Any, fault: str | None) -> None:
    assert fault_of(value, shape) == fault


def test_a_damaged_name_of_the_checksum_is_damage_where_keys_are_known() -> None:
    written = json.dumps(sealed({"rows": 1})).encode()
    assert parse_json(written, {"rows": int, "more?": int}, "file", exact=True) == {"rows": 1}
    assert parse_json(b'{"rows": 1, "more": 2}', {"rows": int, "more?": int}, "file", exact=True)
    with pytest.raises(DamagedFile, match="unknown keys .json_checksun."):
        parse_json(written.replace(b"checksum", b"checksun"), {"rows": int}, "file", exact=True)


def test_a_missing_file_is_none_and_another_error_of_the_disk_is_damage(tmp_path: Path) -> None:
    assert read_json(tmp_path / "gone.json", ANYTHING) is None
    (tmp_path / "file").touch()
    assert read_json(tmp_path / "file" / "inside.json", ANYTHING) is None
    with pytest.raises(DamagedFile, match="cannot be read"):
        read_json(tmp_path, ANYTHING)
