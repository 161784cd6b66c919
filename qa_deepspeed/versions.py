"""What must be the same on every host of a run: `python -m qa_deepspeed.versions` prints it as one JSON object."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path

PACKAGES = ("torch", "deepspeed", "transformers")


def versions() -> dict[str, str]:
    """Versions by package, without importing any; of this package a digest of its code, which has no version yet that
    tells two checkouts apart."""
    found = {name: _version(name) for name in PACKAGES}
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found | {"qa_deepspeed": f"code {digest.hexdigest()[:12]}"}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(json.dumps(versions()))
