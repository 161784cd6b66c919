"""A data set of the Hugging Face hub as one Parquet file, which is read like any other."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import replacing


def hub_file(name: str, config: str | None, split: str, folder: Path, cache_dir: str | None = None) -> str:
    """Path of a Parquet file with the rows of a hub data set, written into `folder` unless it exists.

    Any number of processes may call this at once: the file is renamed into place when it is complete.

    Args:
        name: of the data set on the hub, or a folder that `datasets.load_dataset` understands.
        split: such as `train`, `validation` or `train[:10%]`.
        cache_dir: where `datasets` stores downloads; None for its default.
    Raises:
        UserError: there is no such data set, configuration or split, or it cannot be downloaded or written.
    """
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split, cache_dir=cache_dir, keep_in_memory=False)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        which = f"configuration {config}, split {split}" if config else f"split {split}"
        raise UserError(
            f"data set {name} ({which}) cannot be loaded: {said.removesuffix('.')}; check --dataset_name, "
            "--dataset_config and the split, or pass a file"
        ) from error
    # The paths hold a hash of the data's origin and version; the split selects rows of these files.
    origin = "\n".join([*(file["filename"] for file in rows.cache_files), split])
    digest = hashlib.sha256(origin.encode()).hexdigest()[:16]
    path = folder / f"{name.strip('/').replace('/', '-')[-60:]}-{digest}.parquet"
    if path.exists():
        return str(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            rows.to_parquet(temporary)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); pass another --cache_dir") from error
    return str(path)
