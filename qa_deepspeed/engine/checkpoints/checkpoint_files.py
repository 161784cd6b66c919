"""Folders of checkpoints: state of the loop, manifest with checksums, listing, order and removal.

The contents of the other files are known to engine/checkpoints/checkpoint.py only, which writes and reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qa_deepspeed.models.flat_parameters import FlatNames
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.json_files import ANYTHING, DamagedFile, parse_json, read_json
from qa_deepspeed.utils.progress import ProgressBar, hash_progress, sha256_of

LOOP_FILE = "loop.json"
MANIFEST_FILE = "manifest.json"
MODEL_FOLDER = "model"
"""Config and tokenizer of the model, inside a checkpoint."""

MANIFEST = {"files": {str: {"bytes": int, "sha256": str}}}

HASH_THREADS = 8
"""Files hashed or flushed at the same time; hashing releases the interpreter lock."""


@dataclass(frozen=True)
class LoopState:
    """State of the loop. Order is a function of the step, so resuming needs only this and the shards."""

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
    """State of training.best_checkpoint.BestCheckpoint."""
    flat: FlatNames = field(default_factory=dict)
    """Flat parameters, with names and shapes of the tensors in them."""
    packed: bool = False
    """Whether the rows of a micro-batch were packed end to end."""
    group_by_length: bool = True
    """Whether the rows of a step had similar lengths."""
    place: int = 0
    """Its position in the order in which the folder's checkpoints were written, set by `write_loop_state`. Steps do not
    show it: a run that resumes an earlier checkpoint with changed settings leaves higher steps behind."""


LOOP_STATE = {
    **{name: int for name in ("step", "world_size", "zero_stage", "rows", "place?")},
    **{name: str for name in ("precision", "device")},
    **{name: bool for name in ("packed?", "group_by_length?")},
    "identity": {str: ANYTHING, "global_batch_size": int},
    "optimized": [str],
    "versions": {str: str},
    **{name: {str: ANYTHING} for name in ("options", "config", "best")},
}
"""The shape of loop.json, by `json_files.fault_of`."""


def write_loop_state(folder: Path, state: LoopState) -> None:
    """Write the state into a new checkpoint folder beside the others of the run."""
    place = 1 + max((_place(other) for other in checkpoints(folder.parent)), default=0)
    values = asdict(replace(state, place=place))
    (folder / LOOP_FILE).write_text(json.dumps(values, indent=1), encoding="ascii")


def read_loop_state(checkpoint: Path) -> LoopState:
    """The loop's state of a checkpoint.

    Raises:
        UserError: `checkpoint` is not a complete checkpoint folder, or the file is not what the manifest lists.
    """
    try:
        content = (checkpoint / LOOP_FILE).read_bytes()
        listed = _listed_digest(checkpoint)
        if listed is not None and hashlib.sha256(content).hexdigest() != listed:
            raise DamagedFile(f"{LOOP_FILE} does not hold what was written")
        return LoopState(**parse_json(content, LOOP_STATE, LOOP_FILE))
    except (OSError, DamagedFile, TypeError) as error:  # TypeError for keys of another version
        raise UserError(f"{checkpoint} is not a complete checkpoint of this trainer ({error})") from None


def _listed_digest(checkpoint: Path) -> str | None:
    """SHA-256 of the loop's state in the manifest; None before there is a manifest, or where it is damaged."""
    try:
        manifest = read_json(checkpoint / MANIFEST_FILE, MANIFEST)
    except DamagedFile:
        return None
    entry = manifest["files"].get(LOOP_FILE) if manifest is not None else None
    return None if entry is None else str(entry["sha256"])


def checkpoint_name(step: int, rows: int, rows_now: int) -> str:
    """Name of the checkpoint after `step` steps of `rows` rows, in the folder of a run with steps of `rows_now` rows.

    Steps of another global batch size are counted differently: such checkpoints get a suffix.
    """
    return f"checkpoint-{step}" if rows == rows_now else f"checkpoint-{step}.batch{rows}"


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(checkpoint.name.split("-")[1].split(".")[0])


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders of a run's checkpoints, by step, damaged ones included; unfinished ones have another name."""
    pattern = re.compile(r"checkpoint-\d+(\.batch\d+)?")
    return sorted((path for path in output_dir.glob("checkpoint-*") if pattern.fullmatch(path.name)), key=step_of)


def newest_first(output_dir: Path, identity: Mapping[str, Any]) -> list[Path]:
    """The checkpoints of a run in the order in which resuming tries them: those of the settings `identity` before those
    of earlier settings, each the last written first. Damaged ones, whose order is unknown, come first to be reported.
    """

    def rank(path: Path) -> tuple[bool, bool, int, int]:
        try:
            state = read_loop_state(path)
        except UserError:
            return True, True, 0, step_of(path)
        return False, state.identity == identity, state.place, state.step

    return sorted(checkpoints(output_dir), key=rank, reverse=True)


def rename_by_rows(output_dir: Path, rows_now: int) -> None:
    """Rename every checkpoint to its `checkpoint_name`. After an interruption the next start completes it."""
    moves = []
    for path in checkpoints(output_dir):
        try:
            state = read_loop_state(path)
        except UserError:
            continue
        name = checkpoint_name(state.step, state.identity["global_batch_size"], rows_now)
        if name != path.name:
            moves.append((path, output_dir / name))
    for path, target in sorted(moves, key=lambda move: "." not in move[1].name):  # suffixes first: these free the names
        if not target.exists():
            os.rename(path, target)


def _place(checkpoint: Path) -> int:
    try:
        return read_loop_state(checkpoint).place
    except UserError:
        return 0


def write_manifest(folder: Path) -> None:
    """Flush every file of `folder` to the disk, then write the manifest: names, sizes and SHA-256.

    Raises:
        OSError: the disk is full or fails.
    """
    names = _file_names(folder)
    shown = dist.is_rank_zero()
    with hash_progress(f"flushing {folder.name}", _paths(folder, names), shown) as bar, _threads() as threads:
        found = threads.map(lambda name: _flushed(folder / name, bar), names)
        entries = dict(zip(names, found, strict=True))
    for inner in {(folder / name).parent for name in names}:
        flush_folder(inner)
    with (folder / MANIFEST_FILE).open("w", encoding="utf-8") as file:
        json.dump({"files": entries}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    flush_folder(folder)


def verify_checkpoint(folder: Path) -> str | None:
    """Verify a checkpoint: why it is damaged, as a phrase, or None if every file has its size and checksum."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = read_json(folder / MANIFEST_FILE, MANIFEST)
    except DamagedFile:
        manifest = None
    if manifest is None:
        return f"{MANIFEST_FILE} is missing or cannot be read"
    listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    for name, (size, _) in listed.items():  # sizes first, which cost nothing
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes, {size} were written"
    checking = hash_progress(f"checking {folder.name}", _paths(folder, listed), dist.is_rank_zero())
    with checking as bar, _threads() as threads:
        found = threads.map(lambda name: sha256_of(folder / name, bar), listed)
        for name, digest in zip(listed, found, strict=True):
            if digest != listed[name][1]:
                return f"{name} is corrupted (its SHA-256 differs from the manifest)"
    return None


def total_bytes(folder: Path) -> int:
    """Bytes of all files in `folder`."""
    return sum((folder / name).stat().st_size for name in _file_names(folder))


def remove_old(output_dir: Path, limit: int, keep: Iterable[str]) -> list[Path]:
    """Delete checkpoints until `limit` are left, damaged ones first, then the oldest; those named in `keep` stay."""
    found, kept = sorted(checkpoints(output_dir), key=lambda path: (_place(path), step_of(path))), set(keep)
    removable = [path for path in found if path.name not in kept]
    removed = removable[: max(0, len(found) - max(1, limit))]
    for path in removed:
        remove(path)
    return removed


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that an interruption does not leave a damaged checkpoint."""
    leftover = checkpoint.with_name(f"{checkpoint.name}.old.partial")
    shutil.rmtree(leftover, ignore_errors=True)
    os.rename(checkpoint, leftover)
    shutil.rmtree(leftover, ignore_errors=True)


def remove_leftovers(output_dir: Path) -> None:
    """Delete the remains of interrupted saves and deletions."""
    for path in output_dir.glob("checkpoint-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Flush a folder's names to the disk, as its files were."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _file_names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    return sorted(str(path.relative_to(folder)) for path in files)


def _paths(folder: Path, names: Iterable[str]) -> list[Path]:
    return [folder / name for name in names]


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(HASH_THREADS)


def _flushed(path: Path, bar: ProgressBar) -> dict[str, Any]:
    """Flush a file to the disk; returns its entry in the manifest."""
    digest = sha256_of(path, bar)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
