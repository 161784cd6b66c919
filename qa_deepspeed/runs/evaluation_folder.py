"""The output folder of `evaluate`: answers of another model or another program in it are not overwritten unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.qa.decoding.predictions import NBEST_FILE, NULL_ODDS_FILE, PREDICTIONS_FILE
from qa_deepspeed.qa.report.page import LOGITS_FILE, PAGE_FILE, REPORT_FILE
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import write_json
from qa_deepspeed.utils.json_files import DamagedFile, read_json, sealed

EVALUATION_FILE = "evaluation.json"
"""Says which model the answers beside it are of, and on which data."""

METRICS_FILE = "metrics.json"

ANSWER_FILES = (
    PREDICTIONS_FILE,
    NBEST_FILE,
    NULL_ODDS_FILE,
    METRICS_FILE,
    REPORT_FILE,
    PAGE_FILE,
    LOGITS_FILE,
)
"""What an evaluation writes, beside TensorBoard."""


def refuse_foreign_answers(output_dir: Path, options: RunOptions) -> None:
    """Refuse to replace answers that are not those of `model_name_or_path`; changes nothing.

    Its own are the answers in its own folder, and those whose record (`write_evaluation_record`) names it.

    Raises:
        UserError: names a file and says whose it is.
    """
    found = next((name for name in ANSWER_FILES if (output_dir / name).exists()), None)
    model = _model_identity(options)
    if found is None or options.overwrite_output_dir or model == str(output_dir.resolve()):
        return
    recorded = _recorded_model(output_dir)
    if recorded == model:
        return
    whose = f"of another model ({recorded})" if recorded else "of which no record says whose it is"
    raise UserError(
        f"output_dir {output_dir} holds {found} {whose}: pass another one, or --overwrite_output_dir to replace it"
    )


def saved_metrics(output_dir: Path) -> dict[str, Any]:
    """The metrics of the evaluation in a folder; empty where there are none, or their file is damaged."""
    try:
        return dict(read_json(output_dir / METRICS_FILE, {}) or {})
    except DamagedFile:
        return {}


def write_evaluation_record(output_dir: Path, options: RunOptions) -> None:
    """Record the model and the data of the answers that are about to be written. For rank 0."""
    data = options.data_file("evaluate") or options.dataset_name
    write_json(output_dir / EVALUATION_FILE, sealed({"model": _model_identity(options), "data": data}))


def _model_identity(options: RunOptions) -> str:
    """The absolute path of a folder, or the name of a model of the hub."""
    name = str(options.model_name_or_path)
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _recorded_model(output_dir: Path) -> str | None:
    try:
        record = read_json(output_dir / EVALUATION_FILE, {"model": str})
    except DamagedFile:
        return None
    return None if record is None else str(record["model"])
