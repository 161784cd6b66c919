"""Evaluation: deal the micro-batches, forward, keep each feature's best spans, gather, decode, score.

Everything is keyed by feature id. Micro-batches are cut from the whole set, so no digit depends on the number of ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from qa_deepspeed import dist
from qa_deepspeed.checkpoint_files import checkpoints
from qa_deepspeed.config import RunOptions
from qa_deepspeed.data import ModelFacts, load_features, model_facts, notes
from qa_deepspeed.engine import checkpoint, ds_config
from qa_deepspeed.engine.device import bf16_supported, choose_device
from qa_deepspeed.engine.ds_config import Resolved
from qa_deepspeed.engine.engine import Reader, evaluation_reader, partitioned_birth
from qa_deepspeed.errors import UserError
from qa_deepspeed.files import write_json
from qa_deepspeed.models.families import model_columns
from qa_deepspeed.models.loading import load_model, model_from_config, quiet_transformers
from qa_deepspeed.qa.batching import Batch, Layout, evaluation_batches, make_batch
from qa_deepspeed.qa.decode import Candidates, decode
from qa_deepspeed.qa.feature_store import FeatureStore
from qa_deepspeed.qa.metrics import Gold, Scorer
from qa_deepspeed.qa.predictions import DecodeSettings, write_predictions
from qa_deepspeed.qa.reduction import reduce_to_candidates
from qa_deepspeed.run_folder import writable_folder


@dataclass(frozen=True)
class EvaluationData:
    """What is evaluated: the features and how the model wants them padded."""

    store: FeatureStore
    layout: Layout


def evaluate(reader: Reader, data: EvaluationData, options: RunOptions, output_dir: Path) -> dict[str, Any]:
    """Answer every question and score the answers. Collective; every rank returns the same metrics.

    Rank 0 writes predictions.json, nbest_predictions.json, null_odds.json (with version_2_with_negative) and
    metrics.json into `output_dir`, which must exist.
    """
    candidates = best_candidates(reader, data, options)
    metrics = _answer_and_score(candidates, data.store, options, output_dir) if candidates is not None else {}
    return dist.broadcast_json(metrics)


def _answer_and_score(
    candidates: Candidates, store: FeatureStore, options: RunOptions, output_dir: Path
) -> dict[str, Any]:
    settings = DecodeSettings(
        n_best_size=options.n_best_size,
        max_answer_length=options.max_answer_length,
        version_2_with_negative=options.version_2_with_negative,
        null_score_diff_threshold=options.null_score_diff_threshold,
    )
    scorer = Scorer(options.version_2_with_negative)
    golds = (Gold(example.example_id, tuple(answer.text for answer in example.answers)) for example in store.examples)
    write_predictions(scorer.observe(decode(candidates, store, settings), golds), output_dir, settings)
    metrics = scorer.result()
    write_json(output_dir / "metrics.json", metrics)
    return metrics


def describe(metrics: Mapping[str, Any]) -> str:
    """The metrics as one line for the log."""
    names = ("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1", "best_exact", "best_f1")
    line = "  ".join(f"{name} {metrics[name]:.2f}" for name in names if name in metrics)
    threshold = f"  (at null odds {metrics['best_f1_thresh']:.3f})" if "best_f1_thresh" in metrics else ""
    return f"{line}{threshold}  questions {metrics['total']}"


def best_candidates(reader: Reader, data: EvaluationData, options: RunOptions) -> Candidates | None:
    """The best spans of every feature, on rank 0; None elsewhere. All ranks make the same number of forwards."""
    store = data.store
    if not len(store):  # no context holds a token: every question is answered ""
        return _no_candidates(options.n_best_size) if dist.is_first() else None
    batches = evaluation_batches(store.lengths, options.per_gpu_eval_batch_size, dist.rank(), dist.world_size())
    kept: list[dict[str, np.ndarray]] = []
    with reader.evaluating():
        for rows in tqdm(batches, desc="evaluating", unit="batch", disable=None if dist.is_first() else True):
            batch = make_batch(store.take, rows, data.layout)
            kept.append(_reduce(reader, batch.to(reader.device), options))
    gathered = dist.gather_rows({name: np.concatenate([part[name] for part in kept]) for name in kept[0]})
    if gathered is None:
        return None
    order = np.argsort(gathered["feature_id"], kind="stable")
    gathered = {name: values[order] for name, values in gathered.items()}
    assert np.array_equal(gathered["feature_id"], np.arange(len(store))), "each feature came back exactly once"
    return Candidates(**gathered)


def _no_candidates(count: int) -> Candidates:
    places, logits = np.zeros((0, count), np.int32), np.zeros((0, count), np.float32)
    return Candidates(np.zeros(0, np.int64), places, places, logits, logits, np.zeros(0, np.float32))


def _reduce(reader: Reader, batch: Batch, options: RunOptions) -> dict[str, np.ndarray]:
    """Forward one micro-batch and keep n_best_size spans and the null score of each real row."""
    start_logits, end_logits = reader.eval_forward(batch.inputs)
    return reduce_to_candidates(batch, start_logits, end_logits, options.n_best_size, options.max_answer_length)


def evaluate_checkpoints(
    options: RunOptions,
    resolved: Resolved,
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
        model = model_from_config(facts.config)
        model.load_state_dict(checkpoint.whole_weights(folder))
        target = run_dir / "evaluations" / folder.name
        target.mkdir(parents=True, exist_ok=True)
        whole = dataclasses.replace(resolved, config={**resolved.config, "zero_optimization": {"stage": 0}})
        results[folder.name] = evaluate(evaluation_reader(model, {}, whole, device), data, options, target)
        dist.log0(f"{folder.name}: {describe(results[folder.name])}")
    return results


def evaluate_run(options: RunOptions) -> dict[str, Any]:
    """What `qa-deepspeed evaluate` does: the model of `model_name_or_path` on `predict_file`. Collective.

    Raises:
        UserError: options, data or device do not allow it.
    """
    device = choose_device(options.no_cuda)
    resolved = ds_config.resolve(options, dist.world_size(), device.type, bf16_supported(device), "zero0")
    options = resolved.options
    quiet_transformers(options.verbose_logging)
    output_dir = writable_folder(options.output_dir)
    facts = model_facts(options)
    store = load_features(options, "evaluate", facts)
    tell_features(store, "evaluate", output_dir)
    dist.start(device, options.timeout)
    config = ds_config.finish(resolved, total_steps=1, hidden_size=ds_config.hidden_size(facts.config))
    birth = partitioned_birth(config, options.verbose_logging)  # must outlive the loading
    model, fresh = load_model(options, facts.config)
    del birth
    if fresh:
        raise UserError(f"{options.model_name_or_path} has no trained question-answering head: train it first "
                        f"({', '.join(fresh)} missing)")  # fmt: skip
    data = EvaluationData(store, facts.layout(model_columns(model, facts.config), options.lang_id))
    if options.eval_all_checkpoints:
        evaluate_checkpoints(options, resolved, facts, data, output_dir, device)
    metrics = evaluate(evaluation_reader(model, config, resolved, device), data, options, output_dir)
    dist.log0(describe(metrics))
    return metrics


def tell_features(store: FeatureStore, purpose: str, output_dir: Path) -> None:
    """One line on what was read and made of it; what was rejected goes into a file of the output folder."""
    how = "built" if store.built else "from the cache"
    dist.log0(f"{purpose}: {store.report.summary()}; {len(store):,} features ({how})")
    for note in notes(store):
        dist.log0(f"  {note}")
    if dist.is_first() and store.report.rejected:
        store.report.write_rejected(output_dir / f"rejected_{purpose}.jsonl")
