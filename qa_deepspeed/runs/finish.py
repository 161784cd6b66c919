"""What rank 0 leaves of a finished run beside model and predictions: run.json, the model card, the hub's copy."""

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
"""The options by which runs are compared, beside what is derived of them."""


def hyperparameters(options: RunOptions, identity: Mapping[str, Any], ds_config_name: str) -> dict[str, Any]:
    """What tells this run from others."""
    derived = {name: identity[name] for name in ("steps", "global_batch_size", "precision")}
    return {name: getattr(options, name) for name in HYPERPARAMETERS} | derived | {"ds_config": ds_config_name}


def finish_run(
    folder: Path,
    options: RunOptions,
    identity: dict[str, Any],
    report: Mapping[str, Any],
    costs: dict[str, dict[str, float]],
    ds_config: dict[str, Any],
    stores: Mapping[str, FeatureStore],
    proof: dict[str, Any],
) -> None:
    """Write the model card and run.json of the finished run in `folder`, and upload the model if that is asked for.

    Args:
        report: of the evaluation, with `metrics` and `intervals`; empty if there was none.
        costs: seconds by stage, throughput and peak_memory.
        ds_config: as DeepSpeed got it.
        stores: the features by purpose, "train" and, if there was an evaluation, "evaluate".
        proof: what the saved model was compared with.
    Raises:
        UserError: the upload failed; the run is finished all the same.
    """
    details = {
        "metrics": report.get("metrics", {}),
        "proof": proof,
        **costs,
        "options": options.to_dict(),
        "ds_config": ds_config,
        "data": {purpose: record.data_record(store) for purpose, store in stores.items()},
        "software": record.software(),
        "hardware": record.hardware(),
    }
    write_model_card(folder, options, {"identity": identity, **details}, report.get("intervals", {}))
    write_run(folder, "finished", identity, **details, files=record.checksums(folder))
    if options.push_to_hub:
        dist.log0(f"uploaded to {upload(folder, options.push_to_hub)}")
