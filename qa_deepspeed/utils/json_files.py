"""The one reader of JSON files that this package writes: parsed, of the expected shape, with the checksum they carry.

What it refuses is damaged. Callers name the file in one line and rebuild it or go on without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

CHECKSUM = "json_checksum"
"""Key of a sealed object's checksum of all its other keys."""

ANYTHING = object
"""Shape of any value."""

NUMBER = (int, float)


class DamagedFile(Exception):
    """A file cannot be read, or does not hold what was written; the message begins with its path."""


def read_json(path: Path, shape: Any, exact: bool = False) -> Any:
    """The value in a JSON file, without its checksum; None if there is no such file.

    Args:
        shape: as in `fault_of`.
        exact: an object without a checksum has no other keys than those of the shape, such as a damaged `CHECKSUM`.
    Raises:
        DamagedFile: it cannot be read, is no JSON, has another shape, or its checksum does not match.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read ({error.strerror})") from None
    return parse_json(data, shape, str(path), exact)


def parse_json(data: bytes, shape: Any, name: str, exact: bool = False) -> Any:
    """`read_json` of bytes that were read already; `name` begins the message of an error."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError also for bytes that are not UTF-8
        raise DamagedFile(f"{name}: no JSON ({error})") from None
    without_checksum = isinstance(value, dict) and CHECKSUM not in value
    if isinstance(value, dict) and not without_checksum and value.pop(CHECKSUM) != _checksum(value):
        raise DamagedFile(f"{name}: does not hold what was written (its checksum differs)")
    if fault := fault_of(value, shape):
        raise DamagedFile(f"{name}: {fault}")
    if exact and without_checksum and (others := value.keys() - {key.removesuffix("?") for key in shape}):
        raise DamagedFile(f"{name}: has unknown keys ({', '.join(sorted(others))})")
    return value


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` with its checksum, which `read_json` verifies. Files without one, of earlier versions, are read too."""
    content = {key: one for key, one in value.items() if key != CHECKSUM}
    return {**content, CHECKSUM: _checksum(content)}


def fault_of(value: Any, shape: Any) -> str | None:
    """Why a value has not this shape, as a phrase; None if it has.

    A shape is a type or a tuple of types (`bool` is no `int` here); `[shape]`, a list of such values; or an object:
    `{str: shape}` with such values under any keys, `{"name": shape, "name?": shape}` with these keys (`?`: it may be
    absent) and perhaps others, or both together.
    """
    if isinstance(shape, list):
        return _first_fault(dict(enumerate(value)), shape[0]) if isinstance(value, list) else "a list is expected"
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return "an object is expected"
        if str in shape and (fault := _first_fault(value, shape[str])):
            return fault
        for name, inner in shape.items():
            if name is str:
                continue
            key = name.removesuffix("?")
            if key in value:
                if fault := fault_of(value[key], inner):
                    return f"{key}: {fault}"
            elif key == name:
                return f"'{key}' is missing"
        return None
    kinds = shape if isinstance(shape, tuple) else (shape,)
    fits = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds or object in kinds)
    return None if fits else f"{'/'.join(kind.__name__ for kind in kinds)} is expected, not {type(value).__name__}"


def _first_fault(values: Mapping[Any, Any], shape: Any) -> str | None:
    for key, value in values.items():
        if fault := fault_of(value, shape):
            return f"{key}: {fault}"
    return None


def _checksum(value: Mapping[str, Any]) -> str:
    """Of the value as it comes back from a file: keys are texts there, and tuples are lists."""
    content = json.loads(json.dumps(value))
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
