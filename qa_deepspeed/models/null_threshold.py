"""The tuned null threshold (a bound on the null odds) in a model's config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qa_deepspeed.utils.files import write_json

KEY = "null_score_diff_threshold"


def save_null_threshold(folder: Path, threshold: float) -> None:
    """Write the threshold into the config of the model in `folder`, if there is a model."""
    path = folder / "config.json"
    if path.is_file():
        write_json(path, json.loads(path.read_text(encoding="utf-8")) | {KEY: threshold})


def saved_null_threshold(model_config: Any) -> float:
    """The threshold in a model's config, or 0."""
    return float(getattr(model_config, KEY, 0.0))


def drop_null_threshold(model_config: Any) -> None:
    """Remove a saved threshold: it does not apply to the model that training makes of this one."""
    if hasattr(model_config, KEY):
        delattr(model_config, KEY)
