"""The end of a run on rank 0: writes run.json and the model card, uploads the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.runs import record
from qa_deepspeed.runs.folder import write_run
from qa_deepspeed.runs.hub_upload import upload
from qa_deepspeed.runs.model_card import write_model_card
from qa_deepspeed.utils import dist

HYPERPARAMETERS = (
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "num_train_epochs",
    "max_grad_norm",
    "max_seq_length",
    "doc_stride",
    "seed",
    "model_name_or_path",
)
"""Options shown in TensorBoard's HParams tab, besides derived values."""


def hyperparameters(options: RunOptions, fingerprint: Mapping[str, Any], ds_config_name: str) -> dict[str, Any]:
    """Hyperparameters that distinguish runs in TensorBoard: options and values of the run's fingerprint."""
    derived = {name: fingerprint[name] for name in ("steps", "global_batch_size", "precision")}
    return {name: getattr(options, name) for name in HYPERPARAMETERS} | derived | {"ds_config": ds_config_name}


def finish_run(
    folder: Path,
    options: RunOptions,
    fingerprint: dict[str, Any],
    report: Mapping[str, Any],
    costs: dict[str, dict[str, float]],
    ds_config: dict[str, Any],
    stores: Mapping[str, FeatureStore],
    verified: dict[str, Any],
) -> None:
    """Write the model card and run.json of the finished run in `folder`; upload the model if `push_to_hub` is set.

    Args:
        fingerprint: `runs.identity.run_fingerprint`, stored under the key "identity".
        report: the evaluation's, with `metrics` and `intervals`; empty without an evaluation.
        costs: `seconds` by stage, `throughput` and `peak_memory`.
        ds_config: the config that DeepSpeed received.
        stores: the features by purpose, "train" and, if there was an evaluation, "evaluate".
        verified: result of the reload check, stored under the key "proof".
    Raises:
        UserError: the upload failed; the run is finished and saved.
    """
    details = {
        "metrics": report.get("metrics", {}),
        "proof": verified,
        **costs,
        "options": options.to_dict(),
        "ds_config": ds_config,
        "data": {purpose: record.data_record(store) for purpose, store in stores.items()},
        "software": record.software(),
        "hardware": record.hardware(),
    }
    write_model_card(folder, options, {"identity": fingerprint, **details}, report.get("intervals", {}))
    write_run(folder, "finished", fingerprint, **details, files=record.checksums(folder))
    if options.push_to_hub:
        dist.log0(f"uploaded to {upload(folder, options.push_to_hub)}")
