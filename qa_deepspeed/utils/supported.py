"""Supported versions of the libraries, and the check that the private names in use are there.

Private names are used only in engine/deepspeed_compat.py and engine/config_check.py (DeepSpeed),
models/transformers_compat.py (Transformers, peft), models/torch_compat.py and utils/dist.py (torch). Each of these
files lists its names and checks them at start.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Iterable, Mapping
from types import CodeType, FunctionType
from typing import Any

from qa_deepspeed.utils.errors import UserError

SUPPORTED = {
    "torch": ">=2.11,<2.14",
    "transformers": ">=5.17,<5.24",
    "deepspeed": ">=0.19.8,<0.20",
    "accelerate": ">=1.1,<2",
    "datasets": ">=4,<6",
    "peft": ">=0.18,<0.22",
}
"""Ranges of versions, as in setup.cfg; a test compares the two."""


def require_names(library: str, names: Mapping[str, Iterable[str]]) -> None:
    """Check that a library has the names that are used of it.

    Args:
        library: the package, as in `SUPPORTED`.
        names: for each module ("torch.nn") or class ("torch.nn:Linear") the names expected in it.
    Raises:
        UserError: a name is missing; one line with the installed and the supported versions.
    """
    missing = [name for place, expected in names.items() for name in missing_names(place, expected)]
    if missing:
        raise unsupported(library, f"lacks {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}")


def unsupported(library: str, problem: str) -> UserError:
    """The error for a library of another version than the supported ones, which `problem` shows."""
    return UserError(
        f"{library} {installed_version(library)} {problem}; supported: {library} {SUPPORTED[library]} "
        f"(pip install '{library}{SUPPORTED[library]}')"
    )


def installed_version(library: str) -> str:
    """The installed version of a package, without importing it; "not installed" where there is none."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def missing_names(place: str, expected: Iterable[str]) -> list[str]:
    """Those of the `expected` names that a module or class lacks, each with its place before it."""
    module, _, class_name = place.partition(":")
    try:
        owner: Any = importlib.import_module(module)
        if class_name:
            owner = getattr(owner, class_name)
    except (ModuleNotFoundError, AttributeError):
        return [place]
    known = names_used_in(owner)
    return [f"{place}.{name}" for name in expected if name not in known and not hasattr(owner, name)]


def names_used_in(owner: Any) -> set[str]:
    """Attributes of a module or class, and names that its functions read or set on other objects.

    An instance's attributes exist only once it is made, which is too late for a check at start.
    """
    found = set(dir(owner))
    for part in inspect.getmro(owner) if inspect.isclass(owner) else (owner,):
        for value in vars(part).values():
            kind = type(value)  # isinstance would ask the value, which warns where it is deprecated
            if kind is property:
                value = value.fget
            elif kind in (staticmethod, classmethod):
                value = value.__func__
            if type(value) is FunctionType and (inspect.isclass(owner) or value.__module__ == owner.__name__):
                found |= _names_in_code(inspect.unwrap(value).__code__)
    return found


def _names_in_code(code: CodeType) -> set[str]:
    """Names and texts in a function's code and in the functions inside it."""
    texts = {constant for constant in code.co_consts if isinstance(constant, str)}
    return texts.union(code.co_names, *map(_names_in_code, filter(inspect.iscode, code.co_consts)))
