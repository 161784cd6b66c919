"""Evaluation: forward on every rank (`evaluation_pass`), answer and score on rank 0 (`answers`)."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qa_deepspeed.config.option_groups import AUTO
from qa_deepspeed.config.run_options import RunOptions, check_counts
from qa_deepspeed.engine import ds_config, zero3_loading
from qa_deepspeed.engine.checkpoints import checkpoint
from qa_deepspeed.engine.checkpoints.checkpoint_files import checkpoints, read_loop_state
from qa_deepspeed.engine.device import bf16_supported, choose_device
from qa_deepspeed.engine.ds_config import ResolvedConfig
from qa_deepspeed.engine.engine import EvalModel, evaluation_model
from qa_deepspeed.engine.monitors import without_monitors
from qa_deepspeed.engine.nvme.swap_files import own_swap_folder
from qa_deepspeed.inference.onnx_model import holds_onnx_model, load_onnx_model
from qa_deepspeed.models.facts import ModelFacts, model_facts
from qa_deepspeed.models.heads import Head, head_of
from qa_deepspeed.models.loading import load_config, model_from_config, quiet_transformers, require_trained_weights
from qa_deepspeed.models.lora import LoraSettings, add_adapters
from qa_deepspeed.models.null_threshold import save_null_threshold, saved_null_threshold
from qa_deepspeed.models.trained_settings import with_stored_settings
from qa_deepspeed.qa.features.batching import Layout
from qa_deepspeed.qa.features.families import model_columns
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.qa.metrics.by_file import FILES
from qa_deepspeed.qa.report.page import LOGITS_FILE, PAGE_FILE
from qa_deepspeed.qa.report.result import EvaluationResult
from qa_deepspeed.runs.evaluation_folder import refuse_foreign_answers, write_evaluation_record
from qa_deepspeed.runs.folder import writable_folder
from qa_deepspeed.training.evaluation.evaluation_forward import LOSS, gather_evaluation
from qa_deepspeed.training.evaluation.scoring import (
    about_evaluation,
    answer_and_score,
    decoder,
    evaluation_options,
    save_logits,
)
from qa_deepspeed.training.features import load_features, notes, require_gold
from qa_deepspeed.training.reporting.reporter import may_be_lost
from qa_deepspeed.training.reporting.tensorboard import FOLDER, write_evaluation
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.units import plural

SHOWN = (
    ("exact", "EM", ".2f"),
    ("f1", "F1", ".2f"),
    ("macro_exact", "mean EM of the files", ".2f"),
    ("macro_f1", "mean F1 of the files", ".2f"),
    ("HasAns_f1", "answerable F1", ".2f"),
    ("NoAns_f1", "unanswerable F1", ".2f"),
    ("null_score_diff_threshold", "threshold", ".3f"),
    ("loss", "loss", ".4f"),
)
"""Metrics in a log line: key, name and format."""

SHOWN_FILES = 20
"""Most files with a line of their own in the log."""


@dataclass(frozen=True)
class EvaluationData:
    """What is evaluated: the features, how the model wants them padded, and the tokenizer that made them."""

    store: FeatureStore
    layout: Layout
    tokenizer: Any


def evaluation_head(model: torch.nn.Module, options: RunOptions) -> Head:
    """The head that answers.

    Raises:
        UserError: a head without logits of whole rows, or without a loss beside its answers, is asked for them.
    """
    head = head_of(model, options.version_2_with_negative)
    if options.gather == "full" and head.null_score_is_odds:
        raise UserError("a beam head has no logits of whole rows: leave --gather full out, and decode exact")
    if options.metric_for_best_model == LOSS and head.null_score_is_odds:
        raise UserError("a beam head cannot compute answers and loss in one pass: use --metric_for_best_model f1")
    return head


@dataclass(frozen=True)
class Evaluation:
    """The outcome of an evaluation.

    metrics: by name, the same on every rank. result: what TensorBoard and the model card show beside them, on rank 0;
    None if no question has gold answers.
    """

    metrics: dict[str, Any]
    result: EvaluationResult | None

    @property
    def report(self) -> dict[str, Any]:
        """What report.json holds, on rank 0; empty elsewhere and without an evaluation."""
        return {} if self.result is None else self.result.report


def evaluate(
    reader: EvalModel,
    data: EvaluationData,
    options: RunOptions,
    output_dir: Path,
    about: Mapping[str, str] | None = None,
) -> Evaluation:
    """Answer every question and score the answers. Collective.

    Rank 0 writes predictions.json, nbest_predictions.json, null_odds.json (with version_2_with_negative), metrics.json,
    report.json, report.html and, with `--gather full`, logits.npz into `output_dir`, which must exist. A threshold that
    was tuned goes into the config of the model in `output_dir`, if there is one.

    Args:
        about: what report.html says of the model (`scoring.about_evaluation`); None for that of `evaluate`.
    Raises:
        UserError: as `evaluation_head`.
        StorageError: the disk is full or fails; on every rank.
    """
    head = evaluation_head(reader.module, options)
    with reader.evaluating(), dist.explain_collective_errors("the evaluation"):
        gathered = gather_evaluation(
            reader.eval_forward, head, reader.device, data.store, data.layout, options, output_dir
        )
    results: list[EvaluationResult] = []

    def score() -> dict[str, Any]:
        assert gathered is not None, "rank 0 has gathered"
        if gathered.logits is not None:
            save_logits(gathered.logits, data.store, output_dir / LOGITS_FILE)
        predict = decoder(gathered.candidates, gathered.logits, data.store, data.tokenizer, options.decode_mode)
        metrics, result = answer_and_score(
            predict,
            data.store,
            options,
            head.null_score_is_odds,
            output_dir,
            gathered.losses,
            about or about_evaluation(options, "evaluate"),
        )
        if options.null_score_diff_threshold == AUTO:
            save_null_threshold(output_dir, metrics["null_score_diff_threshold"])
        results.extend([] if result is None else [result])
        return metrics

    with dist.explain_collective_errors("the evaluation"):
        metrics = dist.run_on_rank_zero(score)
    return Evaluation(metrics, results[0] if results else None)


def describe(metrics: Mapping[str, Any]) -> str:
    """The metrics in one line for the log; metrics.json and the report have all of them."""
    parts = [f"{shown} {metrics[name]:{form}}" for name, shown, form in SHOWN if name in metrics]
    parts.append(f"questions {metrics['total']:,}")
    if "not_scored" in metrics:
        parts.append(f"not scored for want of gold answers: {metrics['not_scored']:,}")
    return "  ".join(parts)


def describe_files(metrics: Mapping[str, Any]) -> list[str]:
    """The scores of each of several files, in a line each; empty for one file."""
    files = metrics.get(FILES, {})
    lines = [f"  {name}: {describe(values)}" for name, values in list(files.items())[:SHOWN_FILES]]
    more = len(files) - len(lines)
    return [*lines, f"  ... and {plural(more, 'file')} more in metrics.json"] if more else lines


def _log_metrics(metrics: Mapping[str, Any], prefix: str = "") -> None:
    for line in (prefix + describe(metrics), *describe_files(metrics)):
        dist.log0(line)


def evaluate_checkpoints(
    options: RunOptions,
    resolved: ResolvedConfig,
    facts: ModelFacts,
    data: EvaluationData,
    run_dir: Path,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Evaluate every checkpoint of the run in `run_dir`, each into run_dir/evaluations/checkpoint-N. Collective.

    The weights are put together from the shards on every rank, so the model must fit on one.
    """
    results: dict[str, dict[str, Any]] = {}
    for folder in checkpoints(run_dir):
        target = run_dir / "evaluations" / folder.name
        target.mkdir(parents=True, exist_ok=True)
        reader = model_of_checkpoint(folder, facts, resolved, device)
        steps = str(read_loop_state(folder).step)
        about = about_evaluation(options, "evaluate", str(folder), steps)
        results[folder.name] = evaluate(reader, data, options, target, about).metrics
        _log_metrics(results[folder.name], f"{folder.name}: ")
    return results


def model_of_checkpoint(folder: Path, facts: ModelFacts, resolved: ResolvedConfig, device: torch.device) -> EvalModel:
    """The model of a checkpoint, whole on every rank.

    Raises:
        UserError: the checkpoint is damaged.
    """
    model = model_from_config(facts.config, resolved.options.qa_head)
    adapters = LoraSettings.of(read_loop_state(folder).options)
    if adapters is not None:
        add_adapters(model, adapters, str(resolved.options.model_name_or_path), resolved.options.seed)
    model.load_state_dict(checkpoint.full_weights(folder))
    whole = dataclasses.replace(resolved, config={**resolved.config, "zero_optimization": {"stage": 0}})
    return evaluation_model(model, {}, whole, device)


def evaluate_run(options: RunOptions) -> dict[str, Any]:
    """What `qa-deepspeed evaluate` does: the model of `model_name_or_path` on `predict_file`. Collective.

    Without `output_dir` the scores are printed, and nothing is kept.

    Raises:
        UserError: options, data or device do not allow it.
    """
    require_folder_for_files(options)
    if options.output_dir:
        return _evaluate_into(options, writable_folder(options.output_dir))
    with tempfile.TemporaryDirectory(prefix="qa_deepspeed_evaluate_") as scratch:
        return _evaluate_into(options, Path(scratch))


def require_folder_for_files(options: RunOptions) -> None:
    """Raises UserError if the options of an evaluation without `output_dir` need files of a folder."""
    for name, asked in (("eval_all_checkpoints", options.eval_all_checkpoints), ("gather", options.gather == "full")):
        if asked and not options.output_dir:
            raise UserError(f"{name} reads or leaves files in a folder: pass --output_dir")


def _evaluate_into(options: RunOptions, output_dir: Path) -> dict[str, Any]:
    """`evaluate_run` with its files in `output_dir`."""
    exported = holds_onnx_model(str(options.model_name_or_path))
    device = choose_device(options.no_cuda or exported)
    resolved = ds_config.resolve(options, dist.world_size(), device.type, bf16_supported(device), "zero0")
    if exported:
        require_settings_of_export(resolved)
    for note in resolved.notes:
        dist.log0(f"note: {note}")
    options = evaluation_options(resolved.options)
    check_counts(options)
    quiet_transformers(options.verbose_logging)
    refuse_foreign_answers(output_dir, options)
    options, changed = with_stored_settings(options, load_config(options))
    if changed:
        words = ", ".join(f"{name} {value}" for name, value in changed.items())
        dist.log0(f"as the model was trained: {words}")
    facts = model_facts(options)
    if "null_score_diff_threshold" not in options.given:
        options = dataclasses.replace(options, null_score_diff_threshold=saved_null_threshold(facts.config))
    store = load_features(options, "evaluate", facts)
    log_features(store, "evaluate", output_dir, keep=bool(options.output_dir))
    require_gold(store, options)
    dist.init(device, options.timeout)
    with own_swap_folder(resolved, output_dir, "evaluate") as resolved:
        config = ds_config.finish(resolved, total_steps=1, hidden_size=ds_config.hidden_size(facts.config))
        model, columns = _load_exported(options, facts) if exported else _load_trained(options, facts, config)
        layout = facts.layout(columns, options.lang_id)
        data = EvaluationData(store, layout, facts.tokenizer)
        dist.run_on_rank_zero(lambda: write_evaluation_record(output_dir, options))
        if options.eval_all_checkpoints:
            evaluate_checkpoints(options, resolved, facts, data, output_dir, device)
        reader = (
            EvalModel(model, resolved, device)
            if exported
            else evaluation_model(model, without_monitors(config), resolved, device)
        )
        with contextlib.closing(reader):
            evaluation = evaluate(reader, data, options, output_dir)
    _log_metrics(evaluation.metrics)
    if not options.output_dir:
        dist.log0("nothing is written; --output_dir keeps answers, scores and the report")
    elif evaluation.result is not None:
        if "tensorboard" in options.trackers:
            with may_be_lost(output_dir / FOLDER):
                write_evaluation(output_dir, evaluation.result)
        dist.log0(f"answers, scores and {PAGE_FILE} are in {output_dir}")
    else:
        dist.log0(f"answers are in {output_dir}")
    return evaluation.metrics


def require_settings_of_export(resolved: ResolvedConfig) -> None:
    """Raises UserError if an evaluation of an ONNX export has settings that only a model of Transformers can follow."""
    name = resolved.options.model_name_or_path
    if resolved.precision != "fp32":
        raise UserError(
            f"{name} is an ONNX export, which computes in its own precision: leave {resolved.precision} out"
        )
    if resolved.options.eval_all_checkpoints:
        raise UserError(f"{name} is an ONNX export, which has no checkpoints: leave eval_all_checkpoints out")


def _load_exported(options: RunOptions, facts: ModelFacts) -> tuple[torch.nn.Module, frozenset[str]]:
    """The ONNX export that `model_name_or_path` names, and the columns that it takes."""
    model = load_onnx_model(str(options.model_name_or_path), facts.config)
    dist.log0(f"{options.model_name_or_path} is an ONNX export: onnxruntime runs it, on the CPU")
    return model, model.columns


def _load_trained(
    options: RunOptions, facts: ModelFacts, config: dict[str, Any]
) -> tuple[torch.nn.Module, frozenset[str]]:
    """The model that `model_name_or_path` names, and the columns that it takes. Collective under ZeRO-3."""
    model, fresh = zero3_loading.load(options, facts.config, config)
    require_trained_weights(options.model_name_or_path, model, fresh)
    return model, model_columns(model, facts.config)


def log_features(store: FeatureStore, purpose: str, output_dir: Path, keep: bool = True) -> None:
    """One line on what was read and made of it. keep: write what was rejected into a file of the output folder."""
    how = "built" if store.built else "from the cache"
    taken = f", {len(store.examples):,} of them drawn" if len(store.examples) < store.report.usable else ""
    dist.log0(f"{purpose}: {store.report.summary()}{taken}; {plural(len(store), 'feature')} ({how})")
    for note in [*store.report.advice(), *notes(store)]:
        dist.log0(f"  {note}")
    if dist.is_rank_zero() and store.report.rejected and keep:
        path = output_dir / f"rejected_{purpose}.jsonl"
        store.report.write_rejected(path)
        dist.log0(f"  rejected questions, each with its reason: {path}")
