"""The training loop: each event says who takes part. The only loop there is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import checkpoint
from qa_deepspeed.engine.checkpoint_files import MODEL_FOLDER, LoopState
from qa_deepspeed.engine.ds_config import ResolvedConfig
from qa_deepspeed.engine.engine import Engine, EvalModel
from qa_deepspeed.engine.flops import training_flops
from qa_deepspeed.models.heads import Objective, head_of
from qa_deepspeed.qa.features.batching import Layout, epoch_order, make_batch, micro_batches, micro_batches_by_tokens
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.runs.record import software
from qa_deepspeed.runs.verify import REFERENCE_ROWS, ReferenceOutputs, reference_outputs, save_reference_outputs
from qa_deepspeed.training.best_checkpoint import BestCheckpoint
from qa_deepspeed.training.evaluate import Evaluation, EvaluationData, describe, evaluate
from qa_deepspeed.training.nonfinite_loss import NonfiniteLossGuard
from qa_deepspeed.training.reporter import NullMetricsLogger
from qa_deepspeed.training.stopping import Preempted, StopController
from qa_deepspeed.training.throughput import ThroughputMeter
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.progress import clock


@dataclass
class Run:
    """The parts of a run, and what is known about it while it lasts."""

    options: RunOptions
    resolved: ResolvedConfig
    output_dir: Path
    identity: dict[str, Any]
    store: FeatureStore
    layout: Layout
    evaluation: EvaluationData | None
    steps: int
    pacing: StopController
    best: BestCheckpoint
    tokenizer: Any
    model_config: PretrainedConfig
    seconds: dict[str, float] = field(default_factory=dict)
    throughput: dict[str, float] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last may be a partial batch."""
        return -(-len(self.store) // self.resolved.plan.global_batch_size)

    def order_of_epoch(self, epoch: int) -> list[np.ndarray]:
        """The rows of every step of an epoch."""
        return epoch_order(self.store.lengths, self.resolved.plan.global_batch_size, self.options.seed, epoch)

    def ids_of_step(self, step: int) -> list[str]:
        """The questions of an optimizer step (counted from 0), each once."""
        rows = self.order_of_epoch(step // self.steps_per_epoch)[step % self.steps_per_epoch]
        return [self.store.examples[int(index)].example_id for index in np.unique(self.store.example_index[rows])]


def fit(engine: Engine, run: Run, reporter: NullMetricsLogger, first_step: int) -> int:
    """The loop, from optimizer step `first_step` (counted from 0) to the last; returns the steps that are done."""
    options, plan = run.options, run.resolved.plan
    rank, world_size = dist.rank(), dist.world_size()
    meter = ThroughputMeter(
        engine.device, training_flops(engine.module, run.model_config), engine.measured_peak_flops()
    )
    watch = NonfiniteLossGuard(engine.device)
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
        dist.set_stage(f"step {number}, forward, backward and update")
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
                engine.backward(share * (world_size * plan.gradient_accumulation_steps))
            meter.add(share.detach(), run.store.lengths[rows], batch.inputs["input_ids"].shape[1])
            watch.note(step, share.detach(), rate)
            with meter.clock.phase("update"):
                engine.step(want_norm=logs)
        meter.end_step()
        reporter.advance()
        if logs:  # every rank takes part in the sums, rank 0 writes
            watch.check(run.ids_of_step, run.output_dir)
            _log(engine, meter, reporter, run, number, epoch, rate)
            run.throughput = meter.throughput()
        with meter.paused():
            best_yet = False
            dist.set_stage(f"step {number}, evaluation and save")
            on_the_way = number < run.steps or run.best.watching
            if logs and options.evaluate_during_training and run.evaluation is not None and on_the_way:
                metrics = evaluate_and_report(engine, run, run.evaluation, reporter, number).metrics
                best_yet = run.best.observe(metrics, number, plan.global_batch_size)
            verdict = run.pacing.after_step(number, run.steps)
            if verdict.save or best_yet:  # every rank writes its shards
                watch.check(run.ids_of_step, run.output_dir)
                add_files = _what_export_needs(engine, run)
                best = run.best.checkpoint(plan.global_batch_size)
                writer.save(_loop_state(engine, run, number), add_files, [best] if best else [])
        if verdict.stop:
            run.pacing.ask_for_requeue(verdict.stop)
            raise Preempted(f"stopped by {verdict.stop} after step {number} of {run.steps}; the same command goes on")
    return number


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
        return micro_batches_by_tokens(step_rows, run.store.lengths, rank, world_size, run.options.max_tokens_per_batch)
    return micro_batches(step_rows, rank, world_size, run.resolved.plan.gradient_accumulation_steps)


def _seed_dropout(seed: int, step: int, micro: int, rank: int) -> None:
    """Dropout masks are a function of where we are, not of what came before: resuming need not restore anything."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, micro, rank)).generate_state(1, np.uint64)[0] >> 1))


def _log(
    engine: Engine, meter: ThroughputMeter, reporter: NullMetricsLogger, run: Run, number: int, epoch: int, rate: float
) -> None:
    """Read the meter on all ranks, tell on rank 0."""
    values = meter.read()
    rows_left = (run.steps - number) * run.resolved.plan.global_batch_size
    values |= {"train/learning_rate": rate, "train/epoch": float(epoch)}
    if engine.grad_norm is not None:
        values["train/grad_norm"] = engine.grad_norm
    if engine.precision == "fp16":
        values["train/loss_scale"] = engine.loss_scale
    norm = "" if engine.grad_norm is None else f"grad norm {engine.grad_norm:.3f}  "
    reporter.log(
        number,
        values,
        f"step {number}/{run.steps}  loss {values['train/loss']:.4f}  lr {rate:.3e}  {norm}"
        f"{values['speed/questions_per_second']:.1f} questions/s  {values['speed/tokens_per_second']:,.0f} tokens/s  "
        f"padding {values['speed/padding']:.1%}  of roof {values['speed/mfu']:.0%}  "
        f"{clock(rows_left / values['speed/questions_per_second'])} left",
    )


def evaluate_and_report(
    reader: EvalModel, run: Run, data: EvaluationData, reporter: NullMetricsLogger, number: int
) -> Evaluation:
    """Evaluate after optimizer step `number` and log the scores and the report. Collective."""
    began = time.perf_counter()
    evaluation = evaluate(reader, data, run.options, run.output_dir)
    run.seconds["evaluation"] = run.seconds.get("evaluation", 0.0) + time.perf_counter() - began
    metrics = evaluation.metrics
    numbers = {f"eval/{name}": float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
    reporter.log(number, numbers, f"step {number}/{run.steps}  {describe(metrics)}")
    reporter.evaluation(number, evaluation.result)
    return evaluation


def reference_outputs_of(engine: Engine, run: Run) -> ReferenceOutputs:
    """A few rows and the engine's answers, to prove what is saved with. Collective under ZeRO-3."""
    batch = make_batch(run.store.take, np.arange(min(REFERENCE_ROWS, len(run.store))), run.layout)
    head = head_of(engine.module, run.options.version_2_with_negative)
    return reference_outputs(engine, head.inputs(batch))


def _what_export_needs(engine: Engine, run: Run) -> Callable[[Path], None]:
    """What a checkpoint holds so that a model can be made of it anywhere: config, tokenizer, answers to prove it by."""
    probe = reference_outputs_of(engine, run)
    config: Any = engine.module.config

    def write(folder: Path) -> None:
        config.save_pretrained(folder / MODEL_FOLDER)
        run.tokenizer.save_pretrained(folder / MODEL_FOLDER)
        save_reference_outputs(folder, probe)

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
