"""The settings a model was trained with, in its config.json: evaluations and answers use them by default."""

from __future__ import annotations

import dataclasses
from typing import Any

from qa_deepspeed.config.run_options import RunOptions

KEY = "qa_settings"

SETTINGS: dict[str, type] = {
    "max_seq_length": int,
    "doc_stride": int,
    "doc_stride_is": str,
    "max_query_length": int,
    "max_answer_length": int,
    "version_2_with_negative": bool,
    "metric_language": str,
}
"""Options that shape windows, answers and scores, with their types."""


def store_settings(model_config: Any, options: RunOptions) -> None:
    """Put the settings of a training run into the model's config, in place of those of the model it began with."""
    setattr(model_config, KEY, {name: getattr(options, name) for name in SETTINGS})


def stored_settings(model_config: Any) -> dict[str, Any]:
    """The settings in a model's config; empty for a model of another program. Values of other types are left out."""
    stored = getattr(model_config, KEY, None)
    if not isinstance(stored, dict):
        return {}
    return {name: stored[name] for name, kind in SETTINGS.items() if type(stored.get(name)) is kind}


def with_stored_settings(options: RunOptions, model_config: Any) -> tuple[RunOptions, dict[str, Any]]:
    """The options with the model's settings where they name none themselves, and the settings that differ."""
    changed = {
        name: value
        for name, value in stored_settings(model_config).items()
        if name not in options.given and value != getattr(options, name)
    }
    return dataclasses.replace(options, **changed), changed
