"""The training loop: forward, backward, update, log, evaluate, save, stop. Every rank runs it together."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from qa_deepspeed.config.batch_plan import epoch_steps
from qa_deepspeed.config.intervals import Intervals
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.checkpoints import checkpoint
from qa_deepspeed.engine.checkpoints.checkpoint_files import MODEL_FOLDER, LoopState
from qa_deepspeed.engine.cuda_graphs import Forward, StepGraphs
from qa_deepspeed.engine.ds_config import ResolvedConfig
from qa_deepspeed.engine.engine import Engine, EvalModel
from qa_deepspeed.models.heads import Head, Objective, head_of
from qa_deepspeed.qa.cache.teacher_logits import SoftTargets
from qa_deepspeed.qa.features.batching import Batch, Layout, make_batch
from qa_deepspeed.qa.features.mixture import epoch_size, rows_of_epoch
from qa_deepspeed.qa.features.sampler import (
    balanced_micro_batches,
    balanced_micro_batches_by_tokens,
    epoch_order,
    micro_batches,
    micro_batches_by_tokens,
)
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.qa.metrics.by_file import flat_metrics
from qa_deepspeed.runs.previous import PreviousRun
from qa_deepspeed.runs.record import software
from qa_deepspeed.runs.verify import REFERENCE_ROWS, ReferenceOutputs, reference_outputs, save_reference_outputs
from qa_deepspeed.training.best_checkpoint import BestCheckpoint
from qa_deepspeed.training.evaluation.evaluate import Evaluation, EvaluationData, describe, describe_files, evaluate
from qa_deepspeed.training.evaluation.scoring import about_evaluation
from qa_deepspeed.training.nonfinite_loss import NonfiniteLossGuard
from qa_deepspeed.training.reporting.callbacks import NO_CALLBACKS, Callbacks
from qa_deepspeed.training.reporting.profiler import StepProfiler
from qa_deepspeed.training.reporting.reporter import NullMetricsLogger
from qa_deepspeed.training.reporting.throughput import ThroughputMeter
from qa_deepspeed.training.stopping import Preempted, StopController
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import StorageError
from qa_deepspeed.utils.progress import clock
from qa_deepspeed.utils.threads import one_ahead
from qa_deepspeed.utils.units import plural


@dataclass
class Run:
    """The parts of a run, and what is recorded while it lasts."""

    options: RunOptions
    resolved: ResolvedConfig
    output_dir: Path
    fingerprint: dict[str, Any]
    """Settings that must match to resume (`identity.run_fingerprint`)."""
    store: FeatureStore
    layout: Layout
    group_by_length: bool
    """Whether the rows of a step have similar lengths."""
    evaluation: EvaluationData | None
    steps: int
    stops: StopController
    best: BestCheckpoint
    previous: PreviousRun | None
    """An earlier run that this one overwrites, on rank 0 until something is saved."""
    tokenizer: Any
    model_config: PretrainedConfig
    callbacks: Callbacks = NO_CALLBACKS
    soft_targets: SoftTargets | None = None
    """The teachers' probabilities, where the run has teachers."""
    weights: tuple[float, ...] | None = None
    """Of the training files, where they have some (`features.file_weights`)."""
    overwrites: bool = False
    """Whether there is an earlier run that this one overwrites, on any rank."""
    seconds: dict[str, float] = field(default_factory=dict)
    throughput: dict[str, float] = field(default_factory=dict)

    @cached_property
    def rows_per_epoch(self) -> int:
        """Rows of one epoch; those of files with weights count as often as they are drawn."""
        return epoch_size(self.store.rows_by_file, self.weights)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return epoch_steps(self.rows_per_epoch, self.resolved.plan)

    @cached_property
    def intervals(self) -> Intervals:
        """How often the run logs, evaluates and saves."""
        return Intervals.of(self.options, self.steps, self.steps_per_epoch)

    @property
    def uses_graphs(self) -> bool:
        """Whether micro-batches run as CUDA graphs: their rows are then packed in fixed shapes."""
        return self.layout.packing is not None and self.layout.packing.row_length is not None

    def evaluates_after(self, number: int) -> bool:
        """Whether the loop evaluates after this optimizer step (counted from 1); the model at the end is evaluated by
        itself, and here only where it may be the best."""
        if number == self.steps:
            return self.options.evaluates_during_training and self.best.watching
        return bool(self.intervals.evaluate) and number % self.intervals.evaluate == 0

    def order_of_epoch(self, epoch: int) -> list[np.ndarray]:
        """The rows of every step of an epoch."""
        lengths, batch = self.store.lengths, self.resolved.plan.global_batch_size
        order = self.options.seed, epoch, self.group_by_length
        if self.weights is None:
            return epoch_order(lengths, batch, *order)
        rows = rows_of_epoch(self.store.rows_by_file, self.weights, self.options.seed, epoch)
        return [rows[step] for step in epoch_order(lengths[rows], batch, *order)]

    def ids_of_step(self, step: int) -> list[str]:
        """The questions of an optimizer step (counted from 0), each once."""
        rows = self.order_of_epoch(step // self.steps_per_epoch)[step % self.steps_per_epoch]
        return [self.store.examples[int(index)].example_id for index in np.unique(self.store.example_index[rows])]


def fit(engine: Engine, run: Run, reporter: NullMetricsLogger, first_step: int) -> int:
    """Run the loop from optimizer step `first_step` (counted from 0); returns the number of completed steps.

    Raises:
        Preempted: a signal or the time limit ended the run after a step; a checkpoint is saved.
        UserError: a loss or a gradient is not finite.
    """
    limit, background = run.options.save_total_limit, run.options.save_async
    with checkpoint.CheckpointWriter(engine, run.output_dir, limit, background) as writer:
        return _loop(engine, run, reporter, first_step, writer)


def _loop(
    engine: Engine, run: Run, reporter: NullMetricsLogger, first_step: int, writer: checkpoint.CheckpointWriter
) -> int:
    options, plan = run.options, run.resolved.plan
    rank, overwrites = dist.rank(), run.overwrites
    meter = ThroughputMeter(engine.device, engine.training_flops, engine.measured_peak_flops())
    guard = NonfiniteLossGuard(engine.device)
    profiler = StepProfiler(options.profile_steps, run.output_dir, first_step)
    objective = Objective.of(options)
    head = head_of(engine.module, options.version_2_with_negative, objective)
    engine.module.train()
    graphs = _graphs(engine, run, head) if run.uses_graphs else None
    number = first_step
    batches = _batches(run, first_step, engine.device)
    for step, step_rows in _steps(run, first_step):
        if run.best.should_stop_early:
            dist.log0(f"early stopping: {run.best.metric} was best at step {run.best.step}")
            break
        number = step + 1
        profiler.begin(number)
        logs = number % run.intervals.log == 0 or number == run.steps
        evaluates = run.evaluates_after(number)
        dist.set_stage(f"step {number}, forward, backward and update")
        rate = engine.learning_rate
        parts = _micro_batches(run, step_rows)
        for micro, rows in enumerate(parts):
            engine.begin_micro_batch(last=micro == len(parts) - 1)
            with meter.clock.phase("data"):
                batch = next(batches)
            _seed_dropout(options.seed, step, micro, rank)
            with meter.clock.phase("forward"):
                if graphs is not None:
                    loss = engine.as_forward(graphs.loss, batch, len(step_rows))
                else:
                    loss = weighted_loss(head, engine.train_forward, batch) / len(step_rows)  # its part of the mean
            with meter.clock.phase("backward"):
                # DeepSpeed takes the mean over ranks and accumulation steps; these parts are to be summed.
                engine.backward(loss * (plan.world_size * plan.gradient_accumulation_steps))
            meter.add(loss.detach(), run.store.lengths[rows], batch.computed_tokens)
            guard.note(step, loss.detach(), rate)
            with meter.clock.phase("update"):
                engine.step(want_norm=logs)
        if engine.gradient_norm is not None:
            guard.note_gradient(step, engine.gradient_norm)
        meter.end_step()
        profiler.end(number)
        reporter.advance()
        if logs or evaluates:
            guard.check(run.ids_of_step, run.output_dir, engine.weights_norm())
        if logs:  # every rank takes part in the all-reduce, rank 0 writes
            _log(engine, meter, reporter, run, number, rate)
            run.throughput = meter.throughput()
        with meter.paused():
            is_best = False
            dist.set_stage(f"step {number}, evaluation and save")
            if evaluates and run.evaluation is not None:
                metrics = _metrics_unless_disk_fails(engine, run, run.evaluation, reporter, number)
                is_best = metrics is not None and run.best.observe(metrics, number, plan.global_batch_size)
            decision = run.stops.after_step(number, run.steps)
            if decision.save or is_best:  # every rank writes its shards
                guard.check(run.ids_of_step, run.output_dir, engine.weights_norm())
                best = run.best.checkpoint(plan.global_batch_size)
                add_files, keep = _files_for_export(engine, run), [best] if best else []
                # the run that this one overwrites goes when a checkpoint is complete
                saved = writer.save(_loop_state(engine, run, number), add_files, keep, at_once=overwrites)
                overwrites = overwrites and saved is None
                if saved is not None and run.previous is not None:
                    run.previous.discard()
            _call_saved(run, writer)
        if decision.stop:
            writer.wait()
            _call_saved(run, writer)
            run.stops.ask_for_requeue(decision.stop)
            raise Preempted(
                f"preempted by {decision.stop} after step {number} of {run.steps}; the same command resumes"
            )
    writer.wait()
    _call_saved(run, writer)
    if graphs is not None and graphs.count:
        dist.log0(f"CUDA graphs: {plural(graphs.count, 'shape')} captured in {graphs.seconds:.1f} s")
    profiler.close()
    return number


def _call_saved(run: Run, writer: checkpoint.CheckpointWriter) -> None:
    """Call on_save for the checkpoints that have become complete, also in the background."""
    while writer.completed:
        folder = writer.completed.pop(0)
        run.callbacks.saved(int(folder.name.rpartition("-")[2]), folder)


def weighted_loss(head: Head, forward: Forward, batch: Batch) -> torch.Tensor:
    """The sum of the losses of a micro-batch's rows, dummy rows left out."""
    outputs = batch.by_row(forward(head.training_inputs(batch)))
    return (head.losses(outputs, batch) * batch.weight).sum()


def _graphs(engine: Engine, run: Run, head: Head) -> StepGraphs:
    """What runs micro-batches as CUDA graphs."""
    plan = run.resolved.plan
    accumulates = plan.gradient_accumulation_steps > 1 or run.options.max_tokens_per_batch is not None
    return StepGraphs(
        engine.module, functools.partial(weighted_loss, head), float(plan.world_size), accumulates, dist.log0
    )


def _steps(run: Run, first_step: int) -> Iterator[tuple[int, np.ndarray]]:
    """The sampler: (step, rows of the global batch); any step of any epoch is found by counting, without a replay."""
    epoch, order = -1, []
    for step in range(first_step, run.steps):
        if step // run.steps_per_epoch != epoch:
            epoch = step // run.steps_per_epoch
            order = run.order_of_epoch(epoch)
        yield step, order[step % run.steps_per_epoch]


def _batches(run: Run, first_step: int, device: torch.device) -> Iterator[Batch]:
    """This rank's micro-batches of all steps, on the device.

    On a GPU each is gathered, copied to pinned memory and sent while the one before it is computed.
    """
    take = run.store.take if run.soft_targets is None else run.soft_targets.take
    batches = (
        make_batch(take, rows, run.layout)
        for _, step_rows in _steps(run, first_step)
        for rows in _micro_batches(run, step_rows)
    )
    return batches if device.type == "cpu" else _sent_ahead(batches, device)


def _sent_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The micro-batches on a GPU; a thread copies the next one on a stream of its own, which a capture of the computing
    stream as a CUDA graph does not meet."""
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def sent() -> Iterator[tuple[Batch, torch.cuda.Event]]:
        for batch in batches:
            with torch.cuda.stream(copying):
                moved = batch.to(device)
                arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
                arrived.record(copying)
            yield moved, arrived

    for batch, arrived in one_ahead(sent()):
        computing = torch.cuda.current_stream(device)
        computing.wait_event(arrived)
        for tensor in batch.tensors():
            tensor.record_stream(computing)  # its memory is used again when the computation has read it
        yield batch


def _micro_batches(run: Run, step_rows: np.ndarray) -> list[np.ndarray]:
    """This rank's micro-batches of a step, cut by rows or by tokens; packed rows are dealt by size."""
    place = dist.rank(), dist.world_size()
    lengths, packed = run.store.lengths, run.layout.packing is not None
    tokens, accumulation = run.options.max_tokens_per_batch, run.resolved.plan.gradient_accumulation_steps
    if tokens:
        by_tokens = balanced_micro_batches_by_tokens if packed else micro_batches_by_tokens
        return by_tokens(step_rows, lengths, *place, tokens)
    if packed:
        return balanced_micro_batches(step_rows, lengths, *place, accumulation)
    return micro_batches(step_rows, *place, accumulation)


def _seed_dropout(seed: int, step: int, micro: int, rank: int) -> None:
    """Make dropout masks a function of seed, step, micro-batch and rank, so that resuming restores no random state."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, micro, rank)).generate_state(1, np.uint64)[0] >> 1))


def _log(
    engine: Engine, meter: ThroughputMeter, reporter: NullMetricsLogger, run: Run, number: int, rate: float
) -> None:
    """Read the meter on all ranks, log on rank 0."""
    values = meter.read()
    epoch = number / run.steps_per_epoch
    values |= {"train/learning_rate": rate, "train/epoch": epoch}
    if engine.grad_norm is not None:
        values["train/grad_norm"] = engine.grad_norm
    if engine.precision == "fp16":
        values["train/loss_scale"] = engine.loss_scale
    norm = "" if engine.grad_norm is None else f"grad_norm {engine.grad_norm:.2f}  "
    rows_left = (run.steps - number) * run.resolved.plan.global_batch_size
    reporter.log(
        number,
        values,
        f"step {number}/{run.steps}  epoch {epoch:.2f}  loss {values['train/loss']:.4f}  lr {rate:.1e}  {norm}"
        f"{values['speed/questions_per_second']:.0f} questions/s  {values['speed/tokens_per_second']:,.0f} tokens/s  "
        f"padding {values['speed/padding']:.1%}  MFU {values['speed/mfu']:.0%}  "
        f"ETA {clock(rows_left / values['speed/questions_per_second'])}",
    )
    run.callbacks.logged(number, values)


def _metrics_unless_disk_fails(
    engine: Engine, run: Run, data: EvaluationData, reporter: NullMetricsLogger, number: int
) -> dict[str, Any] | None:
    """The metrics after optimizer step `number`; None where the disk is full or fails, which is logged. Collective."""
    try:
        return evaluate_and_report(engine, run, data, reporter, number).metrics
    except StorageError as error:
        dist.log0(f"no evaluation after step {number}: {error}; training continues")
        return None


def evaluate_and_report(
    model: EvalModel, run: Run, data: EvaluationData, reporter: NullMetricsLogger, number: int
) -> Evaluation:
    """Evaluate after optimizer step `number` and log the scores and the report. Collective."""
    began = time.perf_counter()
    base = f"{run.options.model_name_or_path}, fine-tuned"
    about = about_evaluation(run.options, "train", base, f"{number:,} of {run.steps:,}")
    evaluation = evaluate(model, data, run.options, run.output_dir, about)
    run.seconds["evaluation"] = run.seconds.get("evaluation", 0.0) + time.perf_counter() - began
    metrics = evaluation.metrics
    flat = flat_metrics(metrics)
    numbers = {f"eval/{name}": float(value) for name, value in flat.items() if isinstance(value, (int, float))}
    reporter.log(number, numbers, f"step {number}/{run.steps}  {describe(metrics)}")
    for line in describe_files(metrics):
        dist.log0(line)
    reporter.evaluation(number, evaluation.result)
    run.callbacks.evaluated(number, metrics)
    return evaluation


def reference_outputs_of(engine: Engine, run: Run) -> ReferenceOutputs:
    """A few rows and the engine's logits, for the reload check of what is saved. Collective under ZeRO-3."""
    padded = dataclasses.replace(run.layout, packing=None)
    batch = make_batch(run.store.take, np.arange(min(REFERENCE_ROWS, len(run.store))), padded)
    head = head_of(engine.module, run.options.version_2_with_negative)
    return reference_outputs(engine, head.inputs(batch))


def _files_for_export(engine: Engine, run: Run) -> Callable[[Path], None]:
    """Writes what `export` needs beside the shards: config, tokenizer, and logits for the reload check."""
    reference = reference_outputs_of(engine, run)
    config: Any = engine.module.config

    def write(folder: Path) -> None:
        config.save_pretrained(folder / MODEL_FOLDER)
        run.tokenizer.save_pretrained(folder / MODEL_FOLDER)
        save_reference_outputs(folder, reference)

    return write


def _loop_state(engine: Engine, run: Run, number: int) -> LoopState:
    return LoopState(
        step=number,
        world_size=dist.world_size(),
        zero_stage=engine.zero_stage,
        precision=engine.precision,
        device=engine.device.type,
        identity=run.fingerprint,
        rows=run.rows_per_epoch,
        optimized=engine.optimized_names,
        flat=engine.flat_names,
        packed=run.layout.packing is not None,
        group_by_length=run.group_by_length,
        options=run.options.to_dict(),
        config=engine.config,
        versions=software()["versions"],
        best=run.best.to_dict(),
    )
