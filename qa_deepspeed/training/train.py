"""Training: build the parts, run the loop (`training_loop`), leave a finished model."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from qa_deepspeed.config.batch_plan import keep_global_batch_size, total_steps
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import checkpoint, compiled_ops, ds_config, zero3_loading
from qa_deepspeed.engine.checkpoint_files import damage, read_loop_state
from qa_deepspeed.engine.device import bf16_supported, choose_device
from qa_deepspeed.engine.ds_config import ResolvedConfig
from qa_deepspeed.engine.engine import Engine, EvalModel, training_engine
from qa_deepspeed.models.facts import ModelFacts, model_facts
from qa_deepspeed.models.loading import head_kind, quiet_transformers
from qa_deepspeed.models.lora import LoraSettings, add_adapters
from qa_deepspeed.models.null_threshold import drop_null_threshold
from qa_deepspeed.qa.features.families import model_columns
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.runs import identity as run_identity
from qa_deepspeed.runs.finish import finish_run, hyperparameters
from qa_deepspeed.runs.folder import (
    asked_for_more,
    global_batch_size_of,
    lock_run_dir,
    require_whole_checkpoints,
    resume_decision,
    save_model,
    select_checkpoint,
    writable_folder,
    write_run,
)
from qa_deepspeed.runs.record import software
from qa_deepspeed.runs.verify import ReferenceOutputs, load_reference_outputs, verify_saved_model
from qa_deepspeed.training.best_checkpoint import BestCheckpoint
from qa_deepspeed.training.evaluate import (
    Evaluation,
    EvaluationData,
    evaluate_checkpoints,
    evaluation_head,
    log_features,
    model_of_checkpoint,
)
from qa_deepspeed.training.features import load_features
from qa_deepspeed.training.loop import Run, evaluate_and_report, fit, reference_outputs_of
from qa_deepspeed.training.reporter import make_metrics_logger
from qa_deepspeed.training.stopping import StopController
from qa_deepspeed.training.throughput import peak_memory
from qa_deepspeed.training.validate import validate_options
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError


def train(options: RunOptions) -> dict[str, Any]:
    """Train, evaluate and save as the options say. Every rank calls it; every rank returns the metrics.

    Raises:
        UserError: options, data, folder or device do not allow it; raised before any weights are loaded where possible.
        Preempted: a signal or the clock ended it, a checkpoint is saved, and the same call goes on.
    """
    output_dir = writable_folder(options.output_dir)
    lock = lock_run_dir(output_dir, options)
    try:
        with StopController(options, output_dir) as pacing:
            return _train(options, output_dir, pacing, BestCheckpoint(options))
    finally:
        if lock is not None:
            lock.release()


def _train(options: RunOptions, output_dir: Path, pacing: StopController, best: BestCheckpoint) -> dict[str, Any]:
    began = time.perf_counter()
    device = choose_device(options.no_cuda)
    resolved = validate_options(options, dist.world_size(), device.type, bf16_supported(device))
    options = resolved.options
    for note in resolved.notes:
        dist.log0(f"note: {note}")
    compiled_ops.require(resolved.config)
    quiet_transformers(options.verbose_logging)
    facts = model_facts(options)
    drop_null_threshold(facts.config)
    store, evaluation_store = _features(options, facts, output_dir)
    seconds = {"features": time.perf_counter() - began}

    dist.init(device, options.timeout)
    require_whole_checkpoints(output_dir, options, resolved.zero_stage)
    resolved = _keep_global_batch(resolved, output_dir)
    steps = total_steps(options, len(store), resolved.plan)
    head = head_kind(facts.config, options.qa_head)
    identity = run_identity.identity(resolved, store.fingerprint, steps, head)
    what, checkpoint_asked = dist.run_on_rank_zero(lambda: _begin(output_dir, options, identity))
    pacing.begin()
    if what == "finished":
        dist.log0(f"{output_dir} holds this run, finished: nothing to do (--overwrite_output_dir starts afresh)")
        return {}
    resume_from = select_checkpoint(output_dir, checkpoint_asked, identity) if what == "resume" else None
    began = time.perf_counter()
    engine = _make_engine(resolved, facts, steps, device)
    layout = facts.layout(model_columns(engine.module, facts.config), options.lang_id)
    if evaluation_store is not None:
        evaluation_head(engine.module, options)  # what it refuses is told before the training, not after
    evaluation = EvaluationData(evaluation_store, layout, facts.tokenizer) if evaluation_store is not None else None
    run = Run(
        options,
        resolved,
        output_dir,
        identity,
        store,
        layout,
        evaluation,
        steps,
        pacing,
        best,
        facts.tokenizer,
        facts.config,
        seconds,
    )
    first_step = _resume(engine, run, resume_from) if resume_from is not None else 0
    seconds["loading"] = time.perf_counter() - began
    return _fit_and_finish(engine, run, facts, first_step)


def _fit_and_finish(engine: Engine, run: Run, facts: ModelFacts, first_step: int) -> dict[str, Any]:
    reporter = make_metrics_logger(run.output_dir, run.steps, first_step)
    try:
        began = time.perf_counter()
        with run.pacing.looping():
            done = fit(engine, run, reporter, first_step)
        dist.set_stage("the final save and evaluation")
        run.seconds["training"] = time.perf_counter() - began
        best = _best_before(run, done) if run.options.load_best_model_at_end else None
        reader: EvalModel = engine
        if best is None:
            probe, state = reference_outputs_of(engine, run), engine.full_state_dict()
        else:
            loop = read_loop_state(best)
            done = run_identity.completed_steps(loop, run.identity, len(run.store))
            probe = load_reference_outputs(best, loop.precision, loop.device)
            state = checkpoint.full_weights(best, next(engine.module.parameters()).dtype)
            reader = model_of_checkpoint(best, facts, run.resolved, engine.device)
        proof = dist.run_on_rank_zero(lambda: _save_proved(engine, run, state, probe))
        evaluation = Evaluation({}, None)
        if run.evaluation is not None:
            evaluation = evaluate_and_report(reader, run, run.evaluation, reporter, done)
        if run.evaluation is not None and run.options.eval_all_checkpoints:
            evaluate_checkpoints(run.options, run.resolved, facts, run.evaluation, run.output_dir, engine.device)
        reporter.end(hyperparameters(run.options, run.identity, run.resolved.name), evaluation.metrics)
    finally:
        reporter.close()
    peak = peak_memory(engine.device)
    stores = {"train": run.store} | ({"evaluate": run.evaluation.store} if run.evaluation is not None else {})
    config = ds_config.finish(run.resolved, run.steps, ds_config.hidden_size(facts.config))
    costs = {"seconds": run.seconds, "throughput": run.throughput, "peak_memory": peak}
    dist.run_on_rank_zero(
        lambda: finish_run(run.output_dir, run.options, run.identity, evaluation.report, costs, config, stores, proof),
        no_timeout=True,
    )
    dist.log0(f"model, predictions and tensorboard/ are in {run.output_dir}")
    return evaluation.metrics


def _best_before(run: Run, done: int) -> Path | None:
    """The checkpoint of the best model, if that is another than the model after `done` steps. Collective."""
    name = run.best.checkpoint(run.resolved.plan.global_batch_size)
    if name is None or name == f"checkpoint-{done}":
        return None
    folder = run.output_dir / name
    problem = dist.run_on_rank_zero(lambda: damage(folder))
    if problem:
        dist.log0(f"{folder}: {problem}; the model of step {done} is kept, not the best")
        return None
    dist.log0(f"taking the best model, of {name}: {run.best.metric} {abs(run.best.value):.2f}")
    return folder


def _features(options: RunOptions, facts: ModelFacts, output_dir: Path) -> tuple[FeatureStore, FeatureStore | None]:
    """Training features, and those to evaluate on if the run evaluates. No collective is open meanwhile."""
    store = load_features(options, "train", facts)
    if not len(store):
        raise UserError(
            f"{options.data_file('train') or options.dataset_name} gives no training rows: no context "
            "holds a token, or --windows_without_answer drop left none"
        )
    wanted = options.do_eval or options.evaluate_during_training
    evaluation = load_features(options, "evaluate", facts) if wanted else None
    for purpose, built in (("train", store), ("evaluate", evaluation)):
        if built is not None:
            log_features(built, purpose, output_dir)
    return store, evaluation


def _keep_global_batch(resolved: ResolvedConfig, output_dir: Path) -> ResolvedConfig:
    """Where a run goes on with another number of ranks, its steps keep their rows: accumulation follows. Collective."""
    rows = dist.run_on_rank_zero(lambda: global_batch_size_of(output_dir, resolved.options))
    if rows is None or rows == resolved.plan.global_batch_size:
        return resolved
    return dataclasses.replace(resolved, plan=keep_global_batch_size(resolved.plan, rows))


def _begin(output_dir: Path, options: RunOptions, identity: dict[str, Any]) -> tuple[str, str]:
    """Decide whether to start, resume or be done, and from which checkpoint; mark the folder as this run's (rank 0)."""
    what = resume_decision(output_dir, options, identity)
    asked = "auto" if asked_for_more(output_dir, identity) else options.resume_from_checkpoint
    if what != "finished":
        write_run(output_dir, "running", identity, options=options.to_dict())
    return what, asked


def _make_engine(resolved: ResolvedConfig, facts: ModelFacts, steps: int, device: torch.device) -> Engine:
    options = resolved.options
    config = ds_config.finish(resolved, steps, ds_config.hidden_size(facts.config))
    transformers.set_seed(options.seed)  # a fresh head is the same on all ranks, and in every run of this seed
    model, fresh = zero3_loading.load(options, facts.config, config)
    if fresh:
        dist.log0(f"fresh weights, not in {options.model_name_or_path}: {', '.join(fresh)}")
    adapters = LoraSettings.of(options.to_dict())
    if adapters is not None:
        add_adapters(model, adapters, str(options.model_name_or_path), options.seed)
    engine = training_engine(model, config, resolved, steps, device)
    if adapters is not None:
        dist.log0(f"LoRA: {engine.trained_parameters:,} of {engine.parameters:,} parameters are trained")
    dist.log0(
        f"{resolved.name} (ZeRO stage {resolved.zero_stage}, {resolved.precision}): {steps} optimizer steps, "
        f"{resolved.plan}"
    )
    return engine


def _resume(engine: Engine, run: Run, folder: Path) -> int:
    """Put the engine where `folder` left it; returns the steps already done."""
    state = read_loop_state(folder)
    checkpoint.load(engine, folder, state)
    run.best.restore(state.best)
    step = run_identity.completed_steps(state, run.identity, len(run.store))
    if state.identity != run.identity:
        engine.apply_options(step)
    other = run_identity.other_versions(state.versions, software()["versions"])
    if other:
        dist.log0(f"note: {folder} was written with other versions ({other}): results may differ in rounding")
    dist.log0(f"going on from {folder}, step {step} of {run.steps}")
    return step


def _save_proved(
    engine: Engine, run: Run, state: dict[str, torch.Tensor] | None, probe: ReferenceOutputs
) -> dict[str, Any]:
    """Write the final model; it gets its place when it has been loaded again and answers as the engine. For rank 0."""
    assert state is not None, "rank 0 has the whole state"
    return save_model(
        run.output_dir,
        engine.module,
        state,
        run.tokenizer,
        run.options,
        lambda folder, saved: verify_saved_model(folder, saved, probe),
    )
