"""A JSON schema of run YAML, read off the option groups: editors complete keys, show help and mark mistakes by it."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from qa_deepspeed.config.migration import ALIASES, STRATEGIES, STRATEGY_VALUES
from qa_deepspeed.config.options import fields_of, plain_kind
from qa_deepspeed.config.run_options import MINIMUM, RunOptions

DRAFT = "http://json-schema.org/draft-07/schema#"
"""The newest version of JSON schema that editors support in full."""

JSON_TYPES: dict[type, str | list[str]] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: ["string", "number"],  # a folder 007 needs no quotes
}


def run_schema(command: str) -> dict[str, Any]:
    """The schema of a YAML file for `command` ("train" or "evaluate"): its options and their aliases, no other keys."""
    kinds = typing.get_type_hints(RunOptions)
    properties = {field.name: _property(kinds[field.name], field) for field in fields_of(RunOptions, command)}
    for alias, name in ALIASES.items():
        if name in properties:
            properties[alias] = properties[name] | {"description": f"the same as {name}"}
    for alias, name in STRATEGIES.items():
        if name in properties:
            # YAML takes `no` for false
            properties[alias] = {
                "enum": [*STRATEGY_VALUES, False],
                "description": f"as of TrainingArguments; sets {name}",
            }
    return {
        "$schema": DRAFT,
        "title": f"qa-deepspeed {command} --config FILE",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _property(kind: Any, field: dataclasses.Field[Any]) -> dict[str, Any]:
    """The schema of one option's values, with help and default."""
    metadata = field.metadata
    plain: dict[str, Any] = {"type": JSON_TYPES[plain_kind(kind)]}
    if field.name in MINIMUM:
        plain["minimum"] = MINIMUM[field.name]
    if metadata["choices"]:
        plain = {"enum": list(metadata["choices"])}
    allowed = [plain]
    if metadata["words"]:
        allowed.append({"enum": list(metadata["words"])})
    if metadata["several"]:
        allowed.append({"type": "array", "items": plain, "minItems": 1})
    if metadata["several"] and metadata["choices"]:
        one = f"({'|'.join(metadata['choices'])})"
        allowed.append({"type": "string", "pattern": f"^{one}( *, *{one})*$"})
    if isinstance(kind, types.UnionType) and type(None) in typing.get_args(kind):
        allowed.append({"type": "null"})
    found: dict[str, Any] = {"description": metadata["help"]} | (plain if len(allowed) == 1 else {"anyOf": allowed})
    if field.default is not None:
        found["default"] = field.default
    if metadata["deprecated"]:
        found["deprecated"] = True
    return found
