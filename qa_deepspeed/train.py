"""Training: build the parts, run the loop, leave a finished model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PretrainedConfig

from qa_deepspeed import dist, run_identity
from qa_deepspeed.answers import evaluation_options
from qa_deepspeed.best_model import BestModel
from qa_deepspeed.checkpoint_files import MODEL_FOLDER, LoopState, damage, read_loop_state, step_of
from qa_deepspeed.config import RunOptions, check_objective, keep_global_rows, total_steps
from qa_deepspeed.data import ModelFacts, load_features, model_facts
from qa_deepspeed.engine import checkpoint, ds_config
from qa_deepspeed.engine.device import bf16_supported, choose_device
from qa_deepspeed.engine.ds_config import Resolved
from qa_deepspeed.engine.engine import Engine, Reader, partitioned_birth, training_engine
from qa_deepspeed.engine.roof import training_flops
from qa_deepspeed.errors import UserError
from qa_deepspeed.evaluate import (
    EvaluationData,
    describe,
    evaluate,
    evaluate_checkpoints,
    reader_of_checkpoint,
    tell_features,
)
from qa_deepspeed.finish import finish_run, hyperparameters
from qa_deepspeed.hub_upload import check_upload
from qa_deepspeed.kept_threshold import forget_threshold
from qa_deepspeed.loss_watch import LossWatch
from qa_deepspeed.meter import Meter
from qa_deepspeed.models.families import model_columns
from qa_deepspeed.models.loading import load_model, quiet_transformers
from qa_deepspeed.models.qa_heads import Objective, head_of
from qa_deepspeed.pacing import Pacing, Stopped
from qa_deepspeed.proof import PROBE_ROWS, Probe, load_probe, prove, save_probe, take_probe
from qa_deepspeed.qa.batching import Layout, epoch_order, make_batch, micro_batches, micro_batches_by_tokens
from qa_deepspeed.qa.evaluation_view import view_evaluation
from qa_deepspeed.qa.feature_store import FeatureStore
from qa_deepspeed.record import peak_memory, software
from qa_deepspeed.report import NullReporter, make_reporter
from qa_deepspeed.run_folder import (
    choose_checkpoint,
    claim,
    global_rows_of,
    save_model,
    where_to_begin,
    writable_folder,
    write_run,
)


@dataclass
class Run:
    """The parts of a run, and what is known about it while it lasts."""

    options: RunOptions
    resolved: Resolved
    output_dir: Path
    identity: dict[str, Any]
    store: FeatureStore
    layout: Layout
    evaluation: EvaluationData | None
    steps: int
    pacing: Pacing
    best: BestModel
    tokenizer: Any
    model_config: PretrainedConfig
    seconds: dict[str, float] = field(default_factory=dict)
    throughput: dict[str, float] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last may be a partial batch."""
        return -(-len(self.store) // self.resolved.plan.global_rows)

    def order_of_epoch(self, epoch: int) -> list[np.ndarray]:
        """The rows of every step of an epoch."""
        return epoch_order(self.store.lengths, self.resolved.plan.global_rows, self.options.seed, epoch)

    def ids_of_step(self, step: int) -> list[str]:
        """The questions of an optimizer step (counted from 0), each once."""
        rows = self.order_of_epoch(step // self.steps_per_epoch)[step % self.steps_per_epoch]
        return [self.store.examples[int(index)].example_id for index in np.unique(self.store.example_index[rows])]


def train(options: RunOptions) -> dict[str, Any]:
    """Train, evaluate and save as the options say. Every rank calls it; every rank returns the metrics.

    Raises:
        UserError: options, data, folder or device do not allow it; raised before any weights are loaded where possible.
        Stopped: a signal or the clock ended it, a checkpoint is saved, and the same call goes on.
    """
    output_dir = writable_folder(options.output_dir)
    lock = claim(output_dir)
    try:
        with Pacing(options, output_dir) as pacing:
            return _train(options, output_dir, pacing, BestModel(options))
    finally:
        if lock is not None:
            lock.release()


def _train(options: RunOptions, output_dir: Path, pacing: Pacing, best: BestModel) -> dict[str, Any]:
    began = time.perf_counter()
    device = choose_device(options.no_cuda)
    resolved = ds_config.resolve(options, dist.world_size(), device.type, bf16_supported(device))
    ds_config.check_trainable(resolved)
    options = evaluation_options(resolved.options)
    check_objective(options)
    if options.push_to_hub:
        check_upload(options.push_to_hub)
    quiet_transformers(options.verbose_logging)
    facts = model_facts(options)
    forget_threshold(facts.config)
    store, evaluation_store = _features(options, facts, output_dir)
    seconds = {"features": time.perf_counter() - began}

    dist.start(device, options.timeout)
    resolved = _keep_global_batch(resolved, output_dir)
    steps = total_steps(options, len(store), resolved.plan)
    identity = run_identity.identity(options, store.fingerprint, steps, resolved.plan.global_rows, resolved.precision)
    what = dist.from_first(lambda: _begin(output_dir, options, identity))
    pacing.begin()
    if what == "finished":
        dist.log0(f"{output_dir} holds this run, finished: nothing to do (--overwrite_output_dir starts afresh)")
        return {}
    resume_from = choose_checkpoint(output_dir, options.resume_from_checkpoint) if what == "resume" else None
    began = time.perf_counter()
    engine = _make_engine(resolved, facts, steps, device)
    layout = facts.layout(model_columns(engine.module, facts.config), options.lang_id)
    evaluation = EvaluationData(evaluation_store, layout, facts.tokenizer) if evaluation_store is not None else None
    run = Run(options, resolved, output_dir, identity, store, layout, evaluation, steps, pacing, best,
              facts.tokenizer, facts.config, seconds)  # fmt: skip
    first_step = _resume(engine, run, resume_from) if resume_from is not None else 0
    seconds["loading"] = time.perf_counter() - began
    return _fit_and_finish(engine, run, facts, first_step)


def _fit_and_finish(engine: Engine, run: Run, facts: ModelFacts, first_step: int) -> dict[str, Any]:
    reporter = make_reporter(run.output_dir, run.steps, first_step)
    try:
        began = time.perf_counter()
        with run.pacing.looping():
            done = _fit(engine, run, reporter, first_step)
        dist.at("the final save and evaluation")
        run.seconds["training"] = time.perf_counter() - began
        best = _best_before(run, done) if run.options.load_best_model_at_end else None
        reader: Reader = engine
        if best is None:
            probe, state = _probe(engine, run), engine.whole_state()
        else:
            done, loop = step_of(best), read_loop_state(best)
            probe = load_probe(best, loop.precision, loop.device)
            state = checkpoint.whole_weights(best, next(engine.module.parameters()).dtype)
            reader = reader_of_checkpoint(best, facts, run.resolved, engine.device)
        proof = dist.from_first(lambda: _save_proved(engine, run, state, probe))
        metrics: dict[str, Any] = {}
        if run.evaluation is not None:
            metrics = _evaluate(reader, run, run.evaluation, reporter, done)
        if run.evaluation is not None and run.options.eval_all_checkpoints:
            evaluate_checkpoints(run.options, run.resolved, facts, run.evaluation, run.output_dir, engine.device)
        reporter.end(hyperparameters(run.options, run.identity, run.resolved.name), metrics)
    finally:
        reporter.close()
    peak = peak_memory(engine.device)
    if dist.is_first():
        stores = {"train": run.store} | ({"evaluate": run.evaluation.store} if run.evaluation is not None else {})
        config = ds_config.finish(run.resolved, run.steps, ds_config.hidden_size(facts.config))
        costs = {"seconds": run.seconds, "throughput": run.throughput, "peak_memory": peak}
        finish_run(run.output_dir, run.options, run.identity, metrics, costs, config, stores, proof)
    dist.log0(f"model, predictions and tensorboard/ are in {run.output_dir}")
    return metrics


def _fit(engine: Engine, run: Run, reporter: NullReporter, first_step: int) -> int:
    """The loop, from optimizer step `first_step` (counted from 0) to the last; returns the steps that are done."""
    options, plan = run.options, run.resolved.plan
    rank, world_size = dist.rank(), dist.world_size()
    meter = Meter(engine.device, training_flops(engine.module, run.model_config), engine.measured_roof())
    watch = LossWatch(engine.device)
    writer = checkpoint.Checkpoints(engine, run.output_dir, options.save_total_limit)
    objective = Objective(options.objective == "marginal", options.label_smoothing)
    head = head_of(engine.module, options.version_2_with_negative, objective)
    engine.module.train()
    number = first_step
    for step, epoch, step_rows in _steps(run, first_step):
        if run.best.exhausted:
            dist.log0(f"stopped early: {run.best.metric} was best at step {run.best.step}")
            break
        number = step + 1
        logs = number % options.logging_steps == 0 or number == run.steps
        dist.at(f"step {number}, forward, backward and update")
        rate = engine.learning_rate
        parts = _micro_batches(run, step_rows)
        for micro, rows in enumerate(parts):
            engine.begin_micro_batch(last=micro == len(parts) - 1)
            with meter.clock.phase("data"):
                batch = make_batch(run.store.take, rows, run.layout).to(engine.device)
            _seed_dropout(options.seed, step, micro, rank)
            with meter.clock.phase("forward"):
                losses = head.losses(engine.train_forward(head.training_inputs(batch)), batch)
                share = (losses * batch.weight).sum() / len(step_rows)  # of the mean over the global batch
            with meter.clock.phase("backward"):
                # DeepSpeed takes the mean over ranks and accumulation steps; the shares are to be added up.
                engine.backward(share * (world_size * plan.accumulation))
            meter.add(share.detach(), run.store.lengths[rows], batch.inputs["input_ids"].shape[1])
            watch.note(step, share.detach(), rate)
            with meter.clock.phase("update"):
                engine.step(want_norm=logs)
        meter.end_step()
        reporter.advance()
        if logs:  # every rank takes part in the sums, rank 0 writes
            watch.check(run.ids_of_step, run.output_dir)
            _log(engine, meter, reporter, number, run.steps, epoch, rate)
            run.throughput = meter.throughput()
        with meter.paused():
            best_yet = False
            dist.at(f"step {number}, evaluation and save")
            on_the_way = number < run.steps or run.best.watching
            if logs and options.evaluate_during_training and run.evaluation is not None and on_the_way:
                best_yet = run.best.observe(_evaluate(engine, run, run.evaluation, reporter, number), number)
            verdict = run.pacing.after_step(number, run.steps)
            if verdict.save or best_yet:  # every rank writes its shards
                watch.check(run.ids_of_step, run.output_dir)
                add_files = _what_export_needs(engine, run)
                writer.save(_loop_state(engine, run, number), add_files, run.best.kept_steps)
        if verdict.stop:
            run.pacing.ask_for_requeue(verdict.stop)
            raise Stopped(f"stopped by {verdict.stop} after step {number} of {run.steps}; the same command goes on")
    return number


def _best_before(run: Run, done: int) -> Path | None:
    """The checkpoint of the best model, if that is another than the model after `done` steps. Collective."""
    step = run.best.step
    if step is None or step == done:
        return None
    folder = run.output_dir / f"checkpoint-{step}"
    problem = dist.from_first(lambda: damage(folder))
    if problem:
        dist.log0(f"{folder}: {problem}; the model of step {done} is kept, not the best")
        return None
    dist.log0(f"taking the best model, of step {step}: {run.best.metric} {abs(run.best.value):.2f}")
    return folder


def _steps(run: Run, first_step: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(step, epoch, rows of the global batch), by counting: any step of any epoch is found without replaying."""
    epoch, order = -1, []
    for step in range(first_step, run.steps):
        if step // run.steps_per_epoch != epoch:
            epoch = step // run.steps_per_epoch
            order = run.order_of_epoch(epoch)
        yield step, epoch, order[step % run.steps_per_epoch]


def _micro_batches(run: Run, step_rows: np.ndarray) -> list[np.ndarray]:
    """This rank's share of a step, cut by rows or by tokens."""
    rank, world_size = dist.rank(), dist.world_size()
    if run.options.max_tokens_per_batch:
        return micro_batches_by_tokens(
            step_rows, run.store.lengths, rank, world_size, run.options.max_tokens_per_batch
        )
    return micro_batches(step_rows, rank, world_size, run.resolved.plan.accumulation)


def _seed_dropout(seed: int, step: int, micro: int, rank: int) -> None:
    """Dropout masks are a function of where we are, not of what came before: resuming need not restore anything."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, micro, rank)).generate_state(1, np.uint64)[0] >> 1))


def _log(
    engine: Engine, meter: Meter, reporter: NullReporter, number: int, steps: int, epoch: int, rate: float
) -> None:
    """Read the meter on all ranks, tell on rank 0."""
    values = meter.read()
    values |= {"train/learning_rate": rate, "train/epoch": float(epoch)}
    if engine.grad_norm is not None:
        values["train/grad_norm"] = engine.grad_norm
    if engine.precision == "fp16":
        values["train/loss_scale"] = engine.loss_scale
    norm = "" if engine.grad_norm is None else f"grad norm {engine.grad_norm:.3f}  "
    reporter.log(
        number,
        values,
        f"step {number}/{steps}  loss {values['train/loss']:.4f}  lr {rate:.3e}  {norm}"
        f"{values['speed/questions_per_second']:.1f} questions/s  {values['speed/tokens_per_second']:,.0f} tokens/s  "
        f"padding {values['speed/padding_share']:.1%}  of roof {values['speed/model_flops_utilization']:.0%}",
    )


def _evaluate(
    reader: Reader, run: Run, data: EvaluationData, reporter: NullReporter, number: int
) -> dict[str, Any]:
    began = time.perf_counter()
    metrics = evaluate(reader, data, run.options, run.output_dir)
    run.seconds["evaluation"] = run.seconds.get("evaluation", 0.0) + time.perf_counter() - began
    numbers = {f"eval/{name}": float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
    reporter.log(number, numbers, f"step {number}/{run.steps}  {describe(metrics)}")
    v2, language = run.options.version_2_with_negative, run.options.metric_language
    reporter.evaluation(number, lambda: view_evaluation(run.output_dir, data.store, v2, language))
    reporter.show_evaluation(number, run.output_dir)
    return metrics


def _features(
    options: RunOptions, facts: ModelFacts, output_dir: Path
) -> tuple[FeatureStore, FeatureStore | None]:
    """Training features, and those to evaluate on if the run evaluates. No collective is open meanwhile."""
    store = load_features(options, "train", facts)
    if not len(store):
        raise UserError(f"{options.data_file('train') or options.dataset_name} gives no training rows: no context "
                        "holds a token, or --windows_without_answer drop left none")  # fmt: skip
    wanted = options.do_eval or options.evaluate_during_training
    evaluation = load_features(options, "evaluate", facts) if wanted else None
    for purpose, built in (("train", store), ("evaluate", evaluation)):
        if built is not None:
            tell_features(built, purpose, output_dir)
    return store, evaluation


def _keep_global_batch(resolved: Resolved, output_dir: Path) -> Resolved:
    """Where a run goes on with another number of ranks, its steps keep their rows: accumulation follows. Collective."""
    rows = dist.from_first(lambda: global_rows_of(output_dir, resolved.options))
    if rows is None or rows == resolved.plan.global_rows:
        return resolved
    return dataclasses.replace(resolved, plan=keep_global_rows(resolved.plan, rows))


def _begin(output_dir: Path, options: RunOptions, identity: dict[str, Any]) -> str:
    """Decide whether to start, go on or be done, and mark the folder as this run's. For rank 0."""
    what = where_to_begin(output_dir, options, identity)
    if what != "finished":
        write_run(output_dir, "running", identity, options=options.to_dict())
    return what


def _make_engine(resolved: Resolved, facts: ModelFacts, steps: int, device: torch.device) -> Engine:
    options = resolved.options
    config = ds_config.finish(resolved, steps, ds_config.hidden_size(facts.config))
    transformers.set_seed(options.seed)  # a fresh head is the same on all ranks, and in every run of this seed
    birth = partitioned_birth(config, options.verbose_logging)  # must outlive the loading
    model, fresh = load_model(options, facts.config)
    del birth
    if fresh:
        dist.log0(f"fresh weights, not in {options.model_name_or_path}: {', '.join(fresh)}")
    engine = training_engine(model, config, resolved, steps, device)
    plan = resolved.plan
    dist.log0(
        f"{resolved.name} (ZeRO stage {resolved.zero_stage}, {resolved.precision}): {steps} optimizer steps of "
        f"{plan.global_rows} rows = {plan.rows} rows x {plan.accumulation} accumulation x {plan.world_size} ranks"
    )
    return engine


def _resume(engine: Engine, run: Run, folder: Path) -> int:
    """Put the engine where `folder` left it; returns the steps already done."""
    state = read_loop_state(folder)
    checkpoint.load(engine, folder, state)
    run.best.restore(state.best)
    step = run_identity.place_in(state, run.identity, len(run.store))
    if state.identity != run.identity:
        engine.follow_options(step)
    other = run_identity.other_versions(state.versions, software()["versions"])
    if other:
        dist.log0(f"note: {folder} was written with other versions ({other}): results may differ in rounding")
    dist.log0(f"going on from {folder}, step {step} of {run.steps}")
    return step


def _save_proved(engine: Engine, run: Run, state: dict[str, torch.Tensor] | None, probe: Probe) -> dict[str, Any]:
    """Write the final model; it gets its place when it has been loaded again and answers as the engine. For rank 0."""
    assert state is not None, "rank 0 has the whole state"
    return save_model(
        run.output_dir, engine.module, state, run.tokenizer, run.options, lambda folder: prove(folder, state, probe)
    )


def _probe(engine: Engine, run: Run) -> Probe:
    """A few rows and the engine's answers, to prove what is saved with. Collective under ZeRO-3."""
    batch = make_batch(run.store.take, np.arange(min(PROBE_ROWS, len(run.store))), run.layout)
    head = head_of(engine.module, run.options.version_2_with_negative)
    return take_probe(engine, head.inputs(batch))


def _what_export_needs(engine: Engine, run: Run) -> Callable[[Path], None]:
    """What a checkpoint holds so that a model can be made of it anywhere: config, tokenizer, answers to prove it by."""
    probe = _probe(engine, run)
    config: Any = engine.module.config

    def write(folder: Path) -> None:
        config.save_pretrained(folder / MODEL_FOLDER)
        run.tokenizer.save_pretrained(folder / MODEL_FOLDER)
        save_probe(folder, probe)

    return write


def _loop_state(engine: Engine, run: Run, number: int) -> LoopState:
    return LoopState(
        step=number,
        world_size=dist.world_size(),
        zero_stage=engine.zero_stage,
        precision=engine.precision,
        device=engine.device.type,
        identity=run.identity,
        rows=len(run.store),
        optimized=engine.optimized_names,
        options=run.options.to_dict(),
        config=engine.config,
        versions=software()["versions"],
        best=run.best.to_dict(),
    )
