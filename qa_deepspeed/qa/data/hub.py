"""A data set of the Hugging Face hub as one Parquet file, which the readers take like any other."""

from __future__ import annotations

import os
from pathlib import Path

from qa_deepspeed.utils.errors import UserError


def hub_file(name: str, config: str | None, split: str, folder: Path, cache_dir: str | None = None) -> str:
    """Path of a Parquet file with the rows of a hub data set; made in `folder` unless it is there.

    Any number of processes may call this at once: the file appears whole under a name that follows from its content.

    Args:
        name: of the data set on the hub, or a folder that `datasets.load_dataset` understands.
        split: such as `train`, `validation` or `train[:10%]`.
        cache_dir: where `datasets` keeps what it downloads; None for its own place.
    Raises:
        UserError: there is no such data set, configuration or split, or it cannot be fetched or written.
    """
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split, cache_dir=cache_dir)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"data set {name} (configuration {config}, split {split}) cannot be loaded: {said}") from error
    path = Path(folder) / f"{name.strip('/').replace('/', '-')[-60:]}-{rows._fingerprint}.parquet"
    if path.exists():
        return str(path)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); pass another --cache_dir") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return str(path)
