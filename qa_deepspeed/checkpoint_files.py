"""A checkpoint's folder: the loop's state, the manifest that proves it whole, which ones there are and which may go.

Nothing here knows what the other files hold; engine/checkpoint.py writes and reads those.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qa_deepspeed.errors import UserError

LOOP_FILE = "loop.json"
MANIFEST_FILE = "manifest.json"
MODEL_FOLDER = "model"
"""Config and tokenizer of the model, inside a checkpoint."""

HASH_THREADS = 8
"""Files hashed or flushed at a time; hashing holds no interpreter lock."""


@dataclass(frozen=True)
class LoopState:
    """Where the loop is. Order is a function of the step, so this is all that resuming needs besides the shards."""

    step: int
    world_size: int
    zero_stage: int
    precision: str
    device: str
    """Kind of device: cpu or cuda."""
    identity: dict[str, Any]
    rows: int
    """Training rows of an epoch."""
    optimized: list[str]
    """Trained parameters in the order of the optimizer's groups."""
    options: dict[str, Any]
    config: dict[str, Any]
    """What DeepSpeed was given."""
    versions: dict[str, str]
    best: dict[str, Any]
    """What best_model.BestModel goes on from."""


def write_loop_state(folder: Path, state: LoopState) -> None:
    """Write the state into a checkpoint that is being made."""
    (folder / LOOP_FILE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")


def read_loop_state(checkpoint: Path) -> LoopState:
    """The loop's state of a checkpoint.

    Raises:
        UserError: `checkpoint` is not a complete checkpoint folder.
    """
    try:
        return LoopState(**json.loads((checkpoint / LOOP_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint} is not a complete checkpoint of this trainer ({error})") from None


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(checkpoint.name.split("-")[1])


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders of a run's checkpoints, damaged ones too, oldest first; those being written have another name."""
    named = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(named, key=step_of)


def write_manifest(folder: Path) -> None:
    """Flush every file of `folder` to the disk, then list them with size and SHA-256 in a last file.

    Raises:
        OSError: the disk refuses.
    """
    names = _file_names(folder)
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        entries = dict(zip(names, threads.map(lambda name: _measure(folder / name, flush=True), names), strict=True))
    for inner in {(folder / name).parent for name in names}:
        flush_folder(inner)
    with (folder / MANIFEST_FILE).open("w", encoding="utf-8") as file:
        json.dump({"files": entries}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    flush_folder(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None: every file is there with its size and checksum."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        entries = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} is missing or cannot be read"
    for name, (size, _) in listed.items():  # sizes first: they cost nothing
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes, {size} were written"
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        found = threads.map(lambda name: _measure(folder / name, flush=False)["sha256"], listed)
        for name, digest in zip(listed, found, strict=True):
            if digest != listed[name][1]:
                return f"{name} does not hold what was written (its checksum differs)"
    return None


def total_bytes(folder: Path) -> int:
    """The size of everything in `folder`."""
    return sum((folder / name).stat().st_size for name in _file_names(folder))


def remove_old(output_dir: Path, limit: int, keep: Iterable[int]) -> list[Path]:
    """Delete the oldest checkpoints down to `limit`; those of the steps in `keep` and the newest always stay."""
    found = checkpoints(output_dir)
    kept = set(keep)
    removable = [path for path in found[:-1] if step_of(path) not in kept]
    removed = removable[: max(0, len(found) - max(1, limit))]
    for path in removed:
        # Its name goes first: a deletion that is interrupted must not leave what looks like a damaged checkpoint.
        leftover = path.with_name(path.name + ".partial")
        shutil.rmtree(leftover, ignore_errors=True)
        os.rename(path, leftover)
        shutil.rmtree(leftover, ignore_errors=True)
    return removed


def flush_folder(folder: Path) -> None:
    """Make the names in `folder` as lasting as the files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _file_names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    return sorted(str(path.relative_to(folder)) for path in files)


def _measure(path: Path, flush: bool) -> dict[str, Any]:
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
        if flush:
            os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}
