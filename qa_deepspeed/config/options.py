"""Dataclass fields as options: the command line and the run YAML are both read off one dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qa_deepspeed.config.migration import ALIASES, MOVED, SHORT_NAMES, STRATEGIES, STRATEGY_VALUES
from qa_deepspeed.utils.errors import UserError

Options = TypeVar("Options")

LARGEST_NUMBER = 2**63 - 1
"""Whole numbers of options are at most this: torch and numpy hold no larger ones."""

COMMAND_LINE = "the command line"
"""Where flags come from, in messages."""

_TRUE, _FALSE = {"true", "yes", "1", "on"}, {"false", "no", "0", "off"}


def option(
    default: Any,
    commands: Sequence[str],
    help: str,
    *,
    choices: Sequence[str] | None = None,
    words: Sequence[str] = (),
    several: bool = False,
    deprecated: bool = False,
) -> Any:
    """A dataclass field that is an option.

    commands: the sub-commands that use it. words: accepted as they are in place of a value of the field's type.
    several: commas or blanks separate several values; YAML may have a list. deprecated: accepted, but something else
    does its work now.
    """
    metadata = {
        "help": help,
        "commands": commands,
        "choices": choices,
        "words": words,
        "several": several,
        "deprecated": deprecated,
    }
    return dataclasses.field(default=default, metadata=metadata)


def fields_of(options_class: type, command: str | None = None) -> list[dataclasses.Field[Any]]:
    """The fields of `options_class` that are options; of one sub-command, if it is named."""
    return [
        field
        for field in dataclasses.fields(options_class)
        if "help" in field.metadata and (command is None or command in field.metadata["commands"])
    ]


def add_arguments(parser: argparse.ArgumentParser, options_class: type, command: str) -> None:
    """Declare a flag for each field, in the groups of the classes that define them.

    Flags that are not given stay out of the namespace, so that YAML can fill them.
    """
    kinds = typing.get_type_hints(options_class)
    wanted = {field.name: field for field in fields_of(options_class, command)}
    for group_class in reversed(options_class.__mro__):
        own = [name for name in vars(group_class).get("__annotations__", {}) if name in wanted]
        if not own:
            continue
        group = parser.add_argument_group(group_class.GROUP)  # type: ignore[attr-defined]  # of the option groups
        for name in own:
            kind = plain_kind(kinds[name])
            extra: dict[str, Any] = {"nargs": "?", "const": "true"} if kind is bool else {}
            if wanted[name].metadata["several"]:
                extra = {"nargs": "+"}
            flags = [f"--{name}", *(f"--{alias}" for alias, alias_of in ALIASES.items() if alias_of == name)]
            group.add_argument(
                *flags,
                dest=name,
                default=argparse.SUPPRESS,
                metavar=_placeholder(kind, wanted[name].metadata),
                help=_help_text(wanted[name]),
                **extra,
            )
            strategies = [f"--{alias}" for alias, alias_of in STRATEGIES.items() if alias_of == name]
            if strategies:
                group.add_argument(
                    *strategies,
                    dest=name,
                    action=_StrategyAction,
                    default=argparse.SUPPRESS,
                    metavar="{no,steps,epoch}",
                    help=f"the same as {name} false or true, or eval_steps epoch",
                )


class _StrategyAction(argparse.Action):
    """Sets the option that means the same as a value of TrainingArguments' eval_strategy."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Called by argparse for the flag."""
        try:
            setattr(namespace, *_strategy(values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None


def _strategy(value: Any) -> tuple[str, str]:
    """The option that means the same as a value of eval_strategy, and its value as text."""
    word = "no" if value is False else str(value).lower()  # YAML takes no for false
    if word not in STRATEGY_VALUES:
        raise ValueError(f"must be one of {', '.join(STRATEGY_VALUES)}, not {value!r}")
    return STRATEGY_VALUES[word]


def _under_our_names(settings: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Settings with the options' names in place of their aliases."""
    renamed: dict[str, Any] = {}
    for name, value in settings.items():
        if name in STRATEGIES:
            try:
                name, value = _strategy(value)
            except ValueError as error:
                raise UserError(f"option '{name}' in {origin} {error}") from None
        renamed[ALIASES.get(name, name)] = value
    return renamed


def _placeholder(kind: type, metadata: Mapping[str, Any]) -> str:
    if metadata["choices"]:
        return "{" + ",".join(metadata["choices"]) + "}"
    if kind is bool:
        return "true|false"
    return "|".join([kind.__name__.upper(), *metadata["words"]])


def _help_text(field: dataclasses.Field[Any]) -> str:
    text: str = field.metadata["help"]
    if field.default is not None and not field.metadata["deprecated"]:
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        text += f" (default: {default})"
    return text.replace("%", "%%")


def separate_flags(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """The arguments with `=true` after each bare boolean flag, so that argparse takes no file name for its value."""
    flags = {flag for action in parser._actions if action.const == "true" for flag in action.option_strings}
    separate = list(arguments)
    for index, argument in enumerate(arguments):
        if argument in flags and "".join(arguments[index + 1 : index + 2]).lower() not in _TRUE | _FALSE:
            separate[index] = f"{argument}=true"
    return separate


def build(
    options_class: type[Options],
    command: str,
    given: Mapping[str, Any],
    yaml_path: str | None,
    whole_file: bool = False,
    given_in: str = COMMAND_LINE,
) -> Options:
    """The options of a run: flags win over the YAML file, which wins over the defaults.

    whole_file: the YAML file may set any option, as the file of a training run does for the commands that look at one.
    given_in: where `given` comes from, in messages.

    Raises:
        UserError: unknown keys (with the nearest known ones), a value of the wrong type, an unreadable file.
    """
    of_command = {field.name: field for field in fields_of(options_class, command)}
    in_file = {field.name: field for field in fields_of(options_class)} if whole_file else of_command
    kinds = typing.get_type_hints(options_class)
    values: dict[str, Any] = {}
    from_file, texts = _read_yaml(yaml_path) if yaml_path else ({}, {})
    from_file, texts = (_under_our_names(one, str(yaml_path)) for one in (from_file, texts))
    given = _under_our_names(given, given_in)
    for name in texts.keys() & in_file.keys():
        if plain_kind(kinds[name]) is str and isinstance(from_file[name], (bool, int, float, datetime.date)):
            from_file[name] = texts[name]  # a folder 1.10 or 007 is no number
    origins = ((str(yaml_path), from_file, in_file), (given_in, given, of_command))
    unknown = [
        f"unknown option '{name}' in {origin}{hint(name, known)}"
        for origin, settings, known in origins
        for name in settings
        if name not in known
    ]
    if unknown:
        raise UserError("; ".join(unknown))
    for origin, settings, known in origins:
        for name, raw in settings.items():
            values[name] = _convert(name, raw, kinds[name], known[name].metadata, origin)
    from_file_only = frozenset(from_file).intersection(values).difference(given)
    internal = {"given": frozenset(values), "given_in_file": from_file_only, "config_file": yaml_path}
    names = {field.name for field in dataclasses.fields(options_class)}  # type: ignore[arg-type]  # a dataclass
    return options_class(**values, **{name: value for name, value in internal.items() if name in names})


def as_yaml(options: Any, command: str) -> str:
    """The resolved options as YAML that --config reads: given ones as keys, defaults as comments."""
    lines = []
    for field in fields_of(type(options), command):
        if field.metadata["deprecated"] and field.name not in options.given:
            continue
        entry = yaml_entry(field.name, getattr(options, field.name))
        lines.append(entry if field.name in options.given else f"# {entry}")
    return "\n".join(lines)


def yaml_entry(name: str, value: Any) -> str:
    """One key of a YAML file with its value, in a line."""
    entry: str = yaml.safe_dump({name: value}, allow_unicode=True, width=10**6).strip()
    return entry


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """The words of a command line that sets these options; those that are None are left out."""
    words = []
    for name, given in values.items():
        whole = isinstance(given, float) and given.is_integer() and abs(given) < LARGEST_NUMBER
        value = str(given).lower() if isinstance(given, bool) else str(int(given) if whole else given)
        if given is not None:  # null in a YAML file
            words += [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]
    return words


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint '; did you mean X?' for a misspelt name, or ''."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def hint(flag: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown option: what replaces it here, or the nearest known one, or ''."""
    name, known = flag.lstrip("-"), list(known)
    if name in MOVED:
        return f", a flag of run_qa.py: {MOVED[name]}"
    dashes = flag[: len(flag) - len(name)]
    short = dashes + SHORT_NAMES.get(name, "")
    return f"; did you mean '{short}'?" if name in SHORT_NAMES and short in known else nearest(flag, known)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that stands twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    raise yaml.YAMLError(f"'{key.value}' occurs twice (lines {lines[key.value]} and {line}): keep one")
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def _read_yaml(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of a run file, and those of them as they are written that YAML takes for numbers, dates or truth."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        settings = yaml.load(text, _UniqueKeyLoader)
        written = yaml.load(text, yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"cannot read the run file {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError of dates and numbers that cannot be
        raise UserError(f"the run file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if settings is None:
        return {}, {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UserError(f"the run file {path} must be a mapping of option names to values, like 'learning_rate: 5e-5'")
    return settings, {name: value for name, value in written.items() if isinstance(value, str) and name in settings}


def plain_kind(kind: Any) -> type:
    """`int` of `int | None`."""
    plain: type = kind
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        plain = next(part for part in typing.get_args(kind) if part is not type(None))
    return plain


def _convert(name: str, raw: Any, kind: Any, metadata: Mapping[str, Any], origin: str) -> Any:
    plain, choices, words = plain_kind(kind), metadata["choices"], metadata["words"]
    if (raw is None and type(None) in typing.get_args(kind)) or (isinstance(raw, str) and raw in words):
        return raw
    if metadata["several"] and isinstance(raw, (list, tuple)):
        raw = raw[0] if origin == COMMAND_LINE and len(raw) == 1 else _joined(name, raw, origin)
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
            if (plain is int and isinstance(raw, float) and raw != value) or value != value:
                raise ValueError
        elif plain is str:
            if isinstance(raw, (list, tuple, dict)):
                raise ValueError
            value = str(raw)
    except (TypeError, ValueError, OverflowError):
        expected = " or ".join([_kind_in_words(plain), *map(repr, words)])
        raise UserError(f"option '{name}' in {origin} must be {expected}, not {raw!r}") from None
    if plain is int and value > LARGEST_NUMBER:
        raise UserError(f"option '{name}' in {origin} must be at most {LARGEST_NUMBER}, not {value}")
    if plain is str and "\0" in value:
        raise UserError(f"option '{name}' in {origin} holds a null character")
    parts = [part.strip() for part in value.split(",")] if choices and metadata["several"] else [value]
    if choices and not set(parts) <= set(choices):
        raise UserError(f"option '{name}' in {origin} must be one of {', '.join(choices)}, not {raw!r}")
    return value


def _joined(name: str, values: Sequence[Any], origin: str) -> str:
    texts = [str(value) for value in values]
    for text in texts:
        if "," in text:
            raise UserError(f"option '{name}' in {origin}: a comma separates values, '{text}' cannot hold one")
    return ",".join(texts)


def _kind_in_words(kind: type) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "text")
