"""A training run: build the parts, run the loop (`loop.fit`), save and evaluate the model."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from qa_deepspeed.config.batch_plan import keep_global_batch_size, total_steps
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import compiled_ops, ds_config, zero3_loading
from qa_deepspeed.engine.checkpoints import checkpoint
from qa_deepspeed.engine.checkpoints.checkpoint_files import (
    LoopState,
    read_loop_state,
    rename_by_rows,
    verify_checkpoint,
)
from qa_deepspeed.engine.config_check import without_secrets
from qa_deepspeed.engine.config_choice import choose_config
from qa_deepspeed.engine.cuda_graphs import fixed_shapes, require_graphs, use_own_stream, uses_graphs
from qa_deepspeed.engine.device import bf16_supported, choose_device
from qa_deepspeed.engine.ds_config import ResolvedConfig
from qa_deepspeed.engine.engine import Engine, EvalModel, training_engine
from qa_deepspeed.engine.monitors import Monitors, enabled_monitors, without_monitors
from qa_deepspeed.engine.nvme.swap_files import own_swap_folder
from qa_deepspeed.engine.optim import described_groups
from qa_deepspeed.engine.out_of_memory import explain_out_of_memory
from qa_deepspeed.models.facts import ModelFacts, model_facts
from qa_deepspeed.models.layers import freeze
from qa_deepspeed.models.loading import head_kind, missing_in_backbone, quiet_transformers
from qa_deepspeed.models.lora import LoraSettings, add_adapters
from qa_deepspeed.models.null_threshold import drop_null_threshold
from qa_deepspeed.models.packing import TOKEN_MULTIPLES, choose_packing, confirm_packing
from qa_deepspeed.models.trained_settings import store_settings
from qa_deepspeed.qa.features.batching import Layout
from qa_deepspeed.qa.features.families import model_columns
from qa_deepspeed.qa.features.mixture import epoch_size
from qa_deepspeed.qa.features.sampler import padded_length
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.qa.report.page import PAGE_FILE
from qa_deepspeed.runs.evaluation_folder import saved_metrics
from qa_deepspeed.runs.finish import finish_run, hyperparameters
from qa_deepspeed.runs.folder import (
    files_of_run,
    leave_run_dir,
    lock_run_dir,
    require_whole_checkpoints,
    save_model,
    writable_folder,
    write_run,
)
from qa_deepspeed.runs.identity import completed_steps, other_versions, run_fingerprint
from qa_deepspeed.runs.previous import PreviousRun, recover
from qa_deepspeed.runs.record import software
from qa_deepspeed.runs.resume import (
    FINISHED,
    RESUME,
    ResumeDecision,
    resume_decision,
    resumed_batch_size,
    resumed_config,
    select_checkpoint,
)
from qa_deepspeed.runs.verify import ReferenceOutputs, load_reference_outputs, verify_saved_model
from qa_deepspeed.training.best_checkpoint import BestCheckpoint
from qa_deepspeed.training.disk_patience import DiskPatience, requeue_on_disk_failure
from qa_deepspeed.training.distillation import load_teachers, soft_targets
from qa_deepspeed.training.evaluation.evaluate import (
    Evaluation,
    EvaluationData,
    evaluate_checkpoints,
    evaluation_head,
    log_features,
    model_of_checkpoint,
)
from qa_deepspeed.training.features import file_weights, load_features, require_gold, warnings_of_files
from qa_deepspeed.training.loop import Run, evaluate_and_report, fit, reference_outputs_of
from qa_deepspeed.training.reporting.callbacks import NO_CALLBACKS, Callbacks
from qa_deepspeed.training.reporting.reporter import make_metrics_logger
from qa_deepspeed.training.reporting.throughput import peak_memory
from qa_deepspeed.training.stopping import Preempted, StopController
from qa_deepspeed.training.validate import validate_options
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError


def train(options: RunOptions, callbacks: Callbacks = NO_CALLBACKS, process_ends: bool = True) -> dict[str, Any]:
    """Train, evaluate and save as the options say. Every rank calls it; every rank returns the metrics.

    Of a run that is finished already they are those that it left.

    Args: process_ends: as in `StopController`.

    Raises:
        UserError: options, data, folder or device do not allow it; raised before any weights are loaded where possible.
        Preempted: a signal or the time limit ended it; a checkpoint is saved, and the same call resumes.
        StorageError: the disk is full or fails; the same call resumes from the last checkpoint, if there is one.
    """
    existed = options.output_dir is not None and Path(options.output_dir).exists()
    output_dir = writable_folder(options.output_dir)
    lock = lock_run_dir(output_dir, options)
    try:
        if dist.is_rank_zero() and lock is not None and recover(output_dir):
            dist.log0(f"{output_dir}: put back the run that an interrupted start had moved aside")
        with StopController(options, output_dir, process_ends) as stops, contextlib.ExitStack() as at_end:
            return _train(options, output_dir, stops, callbacks, at_end)
    finally:
        leave_run_dir(output_dir, lock, existed)


def _train(
    options: RunOptions,
    output_dir: Path,
    stops: StopController,
    callbacks: Callbacks,
    at_end: contextlib.ExitStack,
) -> dict[str, Any]:
    began, best = time.perf_counter(), BestCheckpoint(options)
    device = choose_device(options.no_cuda)
    resolved = validate_options(options, dist.world_size(), device.type, bf16_supported(device))
    options = resolved.options
    for note in resolved.notes:
        dist.log0(f"note: {note}")
    compiled_ops.require(resolved.config)
    quiet_transformers(options.verbose_logging)
    facts = model_facts(options)
    drop_null_threshold(facts.config)
    store_settings(facts.config, options)
    store, evaluation_store = _features(options, facts, output_dir)
    teachers = load_teachers(options, facts, store)
    seconds = {"features": time.perf_counter() - began}

    dist.init(device, options.timeout)
    if ds_config.chooses_config(options):
        resolved = _with_chosen_config(resolved, facts, device, output_dir)
    require_whole_checkpoints(output_dir, options, resolved.zero_stage)
    resolved = _keep_global_batch(resolved, output_dir)
    weights = file_weights(options)
    steps = total_steps(options, epoch_size(store.rows_by_file, weights), resolved.plan)
    head = head_kind(facts.config, options.qa_head)
    digests = [teacher.digest for teacher, _ in teachers]
    fingerprint = run_fingerprint(resolved, store.fingerprint, steps, head, weights, digests)
    decided = dist.run_on_rank_zero(lambda: dataclasses.asdict(resume_decision(output_dir, options, fingerprint)))
    decision = ResumeDecision(**decided)
    if decision.action == FINISHED:
        dist.log0(f"{output_dir} holds this run, finished: nothing to do (--overwrite_output_dir starts again)")
        return dict(dist.run_on_rank_zero(lambda: saved_metrics(output_dir)))
    previous = _enter_folder(output_dir, options, fingerprint, decision)
    try:
        stops.begin()
        resolved = at_end.enter_context(own_swap_folder(resolved, output_dir))
        resume_from = _checkpoint_to_resume(output_dir, decision, fingerprint)
        began = time.perf_counter()
        targets = soft_targets(teachers, store, resolved, device)
        if targets is not None:
            seconds["teachers"], began = time.perf_counter() - began, time.perf_counter()
        before = None if resume_from is None else read_loop_state(resume_from)
        with explain_out_of_memory(resolved, facts.config, device):
            engine, layout = _make_engine(resolved, facts, steps, device, store, before)
        grouped = layout.packing is None if before is None else before.group_by_length
        evaluation = None
        if evaluation_store is not None:
            evaluation_head(engine.module, options)  # its errors come before the training, not after
            evaluation = EvaluationData(evaluation_store, dataclasses.replace(layout, packing=None), facts.tokenizer)
        run = Run(
            options=options,
            resolved=resolved,
            output_dir=output_dir,
            fingerprint=fingerprint,
            store=store,
            layout=layout,
            group_by_length=grouped if options.group_by_length is None else options.group_by_length,
            evaluation=evaluation,
            steps=steps,
            stops=stops,
            best=best,
            previous=previous,
            overwrites=decision.overwrites,
            callbacks=callbacks,
            tokenizer=facts.tokenizer,
            model_config=facts.config,
            soft_targets=targets,
            weights=weights,
            seconds=seconds,
        )
        first_step = _resume(engine, run, resume_from) if resume_from is not None else 0
        seconds["loading"] = time.perf_counter() - began
        explained = explain_out_of_memory(resolved, facts.config, device)
        with explained, requeue_on_disk_failure(output_dir, stops), _closing(engine):
            return _fit_and_finish(engine, run, facts, first_step)
    except BaseException:
        if previous is not None:
            previous.restore()
        raise


@contextlib.contextmanager
def _closing(engine: Engine) -> Iterator[None]:
    """Close the engine at the end, whose process may train again; not after an error, in which the device may hang."""
    try:
        yield
    except Preempted:
        engine.close()
        raise
    engine.close()


def _fit_and_finish(engine: Engine, run: Run, facts: ModelFacts, first_step: int) -> dict[str, Any]:
    monitors = _monitors(run, first_step)
    board = "tensorboard" in run.options.trackers
    reporter = make_metrics_logger(run.output_dir, run.steps, first_step, board, monitors)
    try:
        began = time.perf_counter()
        with run.stops.looping(run.intervals.save):
            done = fit(engine, run, reporter, first_step)
        dist.set_stage("the final save and evaluation")
        run.seconds["training"] = time.perf_counter() - began
        best = _best_before(run, done) if run.options.load_best_model_at_end else None
        model: EvalModel = engine
        if best is None:
            reference, state = reference_outputs_of(engine, run), engine.full_state_dict()
        else:
            loop = read_loop_state(best)
            done = completed_steps(loop, run.fingerprint, run.rows_per_epoch)
            reference = load_reference_outputs(best, loop.precision, loop.device)
            state = checkpoint.full_weights(best, next(engine.module.parameters()).dtype)
            model = model_of_checkpoint(best, facts, run.resolved, engine.device)
        patience = DiskPatience(run.options.save_retry)
        verified = patience.call(lambda: dist.run_on_rank_zero(lambda: _save_verified(engine, run, state, reference)))
        run.callbacks.saved(done, run.output_dir)
        evaluation, data = Evaluation({}, None), run.evaluation
        if data is not None:
            evaluation = patience.call(lambda: evaluate_and_report(model, run, data, reporter, done))
        if run.evaluation is not None and run.options.eval_all_checkpoints:
            evaluate_checkpoints(run.options, run.resolved, facts, run.evaluation, run.output_dir, engine.device)
        reporter.end(hyperparameters(run.options, run.fingerprint, run.resolved.name), evaluation.metrics)
    finally:
        reporter.close()
    peak = peak_memory(engine.device)
    stores = {"train": run.store} | ({"evaluate": run.evaluation.store} if run.evaluation is not None else {})
    config = without_secrets(ds_config.finish(run.resolved, run.steps, ds_config.hidden_size(facts.config)))
    costs = {"seconds": run.seconds, "throughput": run.throughput, "peak_memory": peak}
    patience.call(
        lambda: dist.run_on_rank_zero(
            lambda: finish_run(
                run.output_dir, run.options, run.fingerprint, evaluation.report, costs, config, stores, verified
            ),
            no_timeout=True,
        )
    )
    made = ["model", *["predictions"] * bool(evaluation.metrics), *[PAGE_FILE] * (evaluation.result is not None)]
    folder = " and tensorboard/ are" if board else " are" if made[1:] else " is"
    dist.log0(f"{', '.join(made)}{folder} in {run.output_dir}")
    return evaluation.metrics


def _monitors(run: Run, first_step: int) -> Monitors | None:
    """The trackers that the DeepSpeed config enables, on rank 0. Collective.

    Raises:
        UserError: one cannot start.
    """
    config = run.resolved.config
    if not enabled_monitors(config):
        return None
    made: list[Monitors] = []
    dist.run_on_rank_zero(lambda: made.append(Monitors(config, run.options, first_step)))
    return made[0] if made else None


def _best_before(run: Run, done: int) -> Path | None:
    """The checkpoint of the best model, if it is not the model after `done` steps. Collective."""
    name = run.best.checkpoint(run.resolved.plan.global_batch_size)
    if name is None or name == f"checkpoint-{done}":
        return None
    folder = run.output_dir / name
    problem = dist.run_on_rank_zero(lambda: verify_checkpoint(folder))
    if problem:
        dist.log0(f"{folder}: {problem}; ending with the model of step {done} instead of the best")
        return None
    dist.log0(f"best model: {name}, {run.best.metric} {abs(run.best.value):.2f}")
    return folder


def _features(options: RunOptions, facts: ModelFacts, output_dir: Path) -> tuple[FeatureStore, FeatureStore | None]:
    """Training features, and evaluation features if the run evaluates. No collective is open meanwhile."""
    store = load_features(options, "train", facts)
    if not len(store):
        raise UserError(
            f"{options.data_file('train') or options.dataset_name} gives no training rows: no context "
            "holds a token, or --windows_without_answer drop left none"
        )
    wanted = options.do_eval or options.evaluates_during_training
    evaluation = load_features(options, "evaluate", facts) if wanted else None
    for purpose, built in (("train", store), ("evaluate", evaluation)):
        if built is not None:
            log_features(built, purpose, output_dir)
    if evaluation is not None:
        require_gold(evaluation, options)
        for warning in warnings_of_files(options):
            dist.log0(warning)
    return store, evaluation


def _with_chosen_config(
    resolved: ResolvedConfig, facts: ModelFacts, device: torch.device, output_dir: Path
) -> ResolvedConfig:
    """The run with the config that rank 0 chooses for it, or that the resumed run had. Collective."""
    ranks, here = dist.world_size(), dist.local_world_size()

    def choose() -> tuple[str, str]:
        before = resumed_config(output_dir, resolved.options)
        return (before, "") if before else choose_config(resolved, facts.config, device, ranks, here)

    name, why = dist.run_on_rank_zero(choose)
    if why:
        dist.log0(f"deepspeed_config auto: {why}")
    options = dataclasses.replace(resolved.options, deepspeed_config=name)
    resolved = validate_options(options, ranks, device.type, bf16_supported(device))
    compiled_ops.require(resolved.config)
    return resolved


def _keep_global_batch(resolved: ResolvedConfig, output_dir: Path) -> ResolvedConfig:
    """A run resumed on another number of ranks keeps its global batch: accumulation follows. Collective."""
    rows = dist.run_on_rank_zero(lambda: resumed_batch_size(output_dir, resolved.options))
    if rows is None or rows == resolved.plan.global_batch_size:
        return resolved
    return dataclasses.replace(resolved, plan=keep_global_batch_size(resolved.plan, rows))


def _enter_folder(
    output_dir: Path, options: RunOptions, fingerprint: dict[str, Any], decision: ResumeDecision
) -> PreviousRun | None:
    """Act on the decision: move an earlier run aside and mark the folder as this run's. Collective.

    Returns the earlier run, on rank 0 only.
    """
    moved: list[PreviousRun] = []

    def enter() -> None:
        if decision.overwrites:
            moved.append(PreviousRun.move_aside(output_dir, files_of_run(output_dir)))
        write_run(output_dir, "running", fingerprint, options=options.to_dict())

    dist.run_on_rank_zero(enter)
    return moved[0] if moved else None


def _checkpoint_to_resume(output_dir: Path, decision: ResumeDecision, fingerprint: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from, after those of other batch sizes have their own names. Collective."""
    if decision.action != RESUME:
        return None
    if dist.is_first_on_filesystem(output_dir):
        rename_by_rows(output_dir, fingerprint["global_batch_size"])
    dist.barrier()
    return select_checkpoint(output_dir, decision.checkpoint, fingerprint)


def _make_engine(
    resolved: ResolvedConfig,
    facts: ModelFacts,
    steps: int,
    device: torch.device,
    store: FeatureStore,
    before: LoopState | None,
) -> tuple[Engine, Layout]:
    """The engine of a run, and how it wants the rows of `store`.

    Args: before: the state of the checkpoint that is resumed, which fills all weights.
    """
    options = resolved.options
    config = ds_config.finish(resolved, steps, ds_config.hidden_size(facts.config))
    transformers.set_seed(options.seed)  # a fresh head is the same on all ranks, and in every run of this seed
    model, fresh = zero3_loading.load(options, facts.config, config)
    fresh = [] if before is not None else fresh
    if fresh:
        dist.log0(f"fresh weights, not in {options.model_name_or_path}: {', '.join(fresh)}")
    lost = missing_in_backbone(model, fresh)
    if lost:
        dist.log0(
            f"WARNING: {len(lost)} weights of the pretrained model itself are missing in {options.model_name_or_path} "
            f"and drawn at random ({lost[0]}, ...): is the checkpoint complete, and of this architecture?"
        )
    adapters = LoraSettings.of(options.to_dict())
    if adapters is not None:
        add_adapters(model, adapters, str(options.model_name_or_path), options.seed)
    freeze(model, options.freeze)
    groups = described_groups(model, options) if options.freeze or options.layerwise_lr_decay != 1 else []
    layout = facts.layout(model_columns(model, facts.config), options.lang_id)
    packed_before = None if before is None else before.packed
    packing = choose_packing(model, options, store, layout, resolved.zero_stage, packed_before)
    require_graphs(resolved, device.type, packing is not None)
    graphs = uses_graphs(resolved, device.type, packing is not None, dist.world_size())
    if graphs:
        use_own_stream()
    engine = training_engine(model, without_monitors(config), resolved, steps, device, packed=packing is not None)
    if packing is not None:
        if graphs:
            packing = fixed_shapes(packing, padded_length(int(store.lengths.max())))
        else:
            packing = dataclasses.replace(packing, token_multiple=TOKEN_MULTIPLES[device.type])
        layout = dataclasses.replace(layout, packing=packing)
        if resolved.zero_stage == 3:
            packing = confirm_packing(engine, options, store, layout, packed_before)
            layout = dataclasses.replace(layout, packing=packing)
    if adapters is not None:
        dist.log0(f"LoRA: {engine.trained_parameters:,} of {engine.parameters:,} parameters are trained")
    if groups:
        dist.log0("\n".join([f"parameter groups (layerwise_lr_decay {options.layerwise_lr_decay:g}):", *groups]))
    dist.log0(
        f"{resolved.name} (ZeRO stage {resolved.zero_stage}, {resolved.precision}): {steps} optimizer steps, "
        f"{resolved.plan}, {'padded' if layout.packing is None else 'packed'}"
    )
    return engine, layout


def _resume(engine: Engine, run: Run, folder: Path) -> int:
    """Restore engine and best checkpoint from `folder`; returns the completed steps."""
    state = read_loop_state(folder)
    checkpoint.load(engine, folder, state)
    run.best.restore(state.best)
    step = completed_steps(state, run.fingerprint, run.rows_per_epoch)
    if state.identity != run.fingerprint:
        engine.apply_options(step)
    other = other_versions(state.versions, software()["versions"])
    if other:
        dist.log0(f"note: {folder} was written with other versions ({other}): results may differ in rounding")
    dist.log0(f"resuming from {folder}, step {step} of {run.steps}")
    return step


def _save_verified(
    engine: Engine, run: Run, state: dict[str, torch.Tensor] | None, reference: ReferenceOutputs
) -> dict[str, Any]:
    """Write the final model; it gets its place after the reload check. For rank 0."""
    assert state is not None, "rank 0 has the whole state"
    verified = save_model(
        run.output_dir,
        engine.module,
        state,
        run.tokenizer,
        run.options,
        lambda folder, saved: verify_saved_model(folder, saved, reference),
    )
    if run.previous is not None:
        run.previous.discard()
    return verified
