"""Dataclass fields as options: the command line and the run YAML are both read off one dataclass.

An option touches two places: its field, with the help text, and its use.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qa_deepspeed.config.migration import MOVED
from qa_deepspeed.utils.errors import UserError

Options = TypeVar("Options")

_TRUE, _FALSE = {"true", "yes", "1", "on"}, {"false", "no", "0", "off"}


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    words: Sequence[str] = (),
    only: str | None = None,
    retired: bool = False,
) -> Any:
    """A dataclass field that is an option.

    `words` are taken as they are in place of a value of the field's type; `only` names the one sub-command that takes
    it; `retired` marks a flag that is accepted and answered, but whose work something else does now.
    """
    metadata = {"help": help, "choices": choices, "words": words, "only": only, "retired": retired}
    return dataclasses.field(default=default, metadata=metadata)


def fields_of(options_class: type, command: str) -> list[dataclasses.Field]:
    """The fields of `options_class` that the sub-command `command` takes."""
    return [
        field
        for field in dataclasses.fields(options_class)
        if "help" in field.metadata and field.metadata["only"] in (None, command)
    ]


def add_arguments(parser: argparse.ArgumentParser, options_class: type, command: str) -> None:
    """Declare a flag for each field. Flags that are not given stay out of the namespace, so that YAML can fill them."""
    kinds = typing.get_type_hints(options_class)
    for field in fields_of(options_class, command):
        kind = _plain_kind(kinds[field.name])
        help_text = field.metadata["help"]
        if field.default not in (None, False, True) and not field.metadata["retired"]:
            help_text += f" (default {field.default})"
        extra: dict[str, Any] = {"nargs": "?", "const": "true"} if kind is bool else {}
        parser.add_argument(
            f"--{field.name}",
            default=argparse.SUPPRESS,
            metavar="true|false" if kind is bool else "|".join([kind.__name__.upper(), *field.metadata["words"]]),
            help=help_text.replace("%", "%%"),
            **extra,
        )


def separate_flags(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """The arguments with `=true` after each bare boolean flag, so that argparse takes no file name for its value."""
    flags = {flag for action in parser._actions if action.const == "true" for flag in action.option_strings}
    separate = list(arguments)
    for index, argument in enumerate(arguments):
        if argument in flags and "".join(arguments[index + 1 : index + 2]).lower() not in _TRUE | _FALSE:
            separate[index] = f"{argument}=true"
    return separate


def build(options_class: type[Options], command: str, given: dict[str, Any], yaml_path: str | None) -> Options:
    """The options of a run: flags win over the YAML file, which wins over the defaults.

    Raises:
        UserError: unknown key (the nearest known one is named), a value of the wrong type, an unreadable file.
    """
    known = {field.name: field for field in fields_of(options_class, command)}
    kinds = typing.get_type_hints(options_class)
    values: dict[str, Any] = {}
    for origin, settings in ((yaml_path, _read_yaml(yaml_path) if yaml_path else {}), ("the command line", given)):
        for name, raw in settings.items():
            if name not in known:
                raise UserError(f"unknown option '{name}' in {origin}{fate_of(name, known)}")
            values[name] = _convert(name, raw, kinds[name], known[name].metadata, str(origin))
    return options_class(**values, given=frozenset(values))  # type: ignore[call-arg]


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint '; did you mean X?' for a misspelt name, or ''."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def fate_of(flag: str, known: Iterable[str]) -> str:
    """What an error about an unknown option goes on with: what does its work here, or the nearest known one, or ''."""
    told = MOVED.get(flag.lstrip("-"))
    return f", a flag of run_qa.py: {told}" if told else nearest(flag, known)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the run file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the run file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UserError(f"the run file {path} must be a mapping of option names to values, like 'learning_rate: 5e-5'")
    return settings


def _plain_kind(kind: Any) -> type:
    """`int` of `int | None`."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _convert(name: str, raw: Any, kind: Any, metadata: Mapping[str, Any], origin: str) -> Any:
    plain, choices, words = _plain_kind(kind), metadata["choices"], metadata["words"]
    if (raw is None and type(None) in typing.get_args(kind)) or (isinstance(raw, str) and raw in words):
        return raw
    value: Any = raw
    try:
        if plain is bool and not isinstance(raw, bool):
            word = str(raw).lower()
            if word not in _TRUE | _FALSE:
                raise ValueError
            value = word in _TRUE
        elif plain in (int, float):
            if isinstance(raw, bool):
                raise ValueError
            value = plain(raw)
            if plain is int and isinstance(raw, float) and raw != value:
                raise ValueError
        elif plain is str:
            value = str(raw)
    except (TypeError, ValueError):
        expected = " or ".join([_spoken(plain), *map(repr, words)])
        raise UserError(f"option '{name}' in {origin} must be {expected}, not {raw!r}") from None
    if choices and value not in choices:
        raise UserError(f"option '{name}' in {origin} must be one of {', '.join(choices)}, not {raw!r}")
    return value


def _spoken(kind: type) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "text")
