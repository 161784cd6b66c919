"""The tuned null threshold (a bound on the null odds) in a model's config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import write_json
from qa_deepspeed.utils.json_files import ANYTHING, DamagedFile, read_json

KEY = "null_score_diff_threshold"


def save_null_threshold(folder: Path, threshold: float) -> None:
    """Write the threshold into the config of the model in `folder`, if there is a model.

    Raises:
        UserError: the config is damaged.
    """
    path = folder / "config.json"
    try:
        config = read_json(path, {str: ANYTHING})
    except DamagedFile as error:
        raise UserError(f"{error}: the null threshold {threshold:g} cannot be stored in it") from None
    if config is not None:
        write_json(path, config | {KEY: threshold})


def saved_null_threshold(model_config: Any) -> float:
    """The threshold in a model's config, or 0."""
    return float(getattr(model_config, KEY, 0.0))


def drop_null_threshold(model_config: Any) -> None:
    """Remove a saved threshold: it does not apply to the model that training makes of this one."""
    if hasattr(model_config, KEY):
        delattr(model_config, KEY)
