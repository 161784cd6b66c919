"""`qa-deepspeed check` and `train --dry_run`: would this run start, and what would it do? No weights are loaded."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from qa_deepspeed.config.batch_plan import epoch_steps, total_steps
from qa_deepspeed.config.intervals import Intervals
from qa_deepspeed.config.option_groups import AUTO, EPOCH
from qa_deepspeed.config.run_arguments import add_run_arguments, read_run_options
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import compiled_ops, ds_config, hosts
from qa_deepspeed.engine.checkpoint import checkpoint_bytes
from qa_deepspeed.engine.ds_config import ResolvedConfig
from qa_deepspeed.engine.memory import ZeroSettings, estimate_cpu_memory, estimate_memory
from qa_deepspeed.engine.optim import default_schedule
from qa_deepspeed.models.facts import ModelFacts, model_facts
from qa_deepspeed.models.footprint import Footprint, describe_parameters, footprint
from qa_deepspeed.models.loading import head_kind, quiet_transformers, require_weights
from qa_deepspeed.models.lora import LoraSettings
from qa_deepspeed.qa.data.reading import resolve_files
from qa_deepspeed.runs.folder import leave_run_dir, lock_run_dir
from qa_deepspeed.runs.identity import run_fingerprint
from qa_deepspeed.runs.resume import (
    FINISHED,
    RESUME,
    START,
    refuse_overwriting,
    require_named_checkpoint,
    resume_decision,
)
from qa_deepspeed.training.features import (
    EPOCH_ROWS,
    file_weights,
    longest_rows_at_once,
    look_up_features,
    trained_and_evaluated,
)
from qa_deepspeed.training.validate import validate_options
from qa_deepspeed.utils.dtypes import weight_dtype
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.units import GIB, plural

DEFAULT_PORT = 29500
SAMPLED_RATES = 1000

CACHE_PER_INPUT = 2.0
"""Bytes of cached features for each byte of input, as measured on SQuAD (2.0 with MiniLM's tokenizer)."""


@dataclass
class PreflightState:
    """What is known of the run so far; None where a fault keeps it unknown."""

    options: RunOptions
    hosts: list[hosts.Host] | None
    ranks: int
    ranks_here: int
    port: int
    ssh_port: int | None
    resolved: ResolvedConfig | None = None
    facts: ModelFacts | None = None
    config: dict[str, Any] | None = None
    features: dict[str, tuple[str, dict[str, int] | None]] = field(default_factory=dict)
    steps: int | None = None
    intervals: Intervals | None = None
    footprint: Footprint | None = None


class SkipCheck(Exception):
    """An earlier fault makes this check impossible."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `check`: those of a training run and of its launch."""
    parser.add_argument("--hostfile", help="DeepSpeed hostfile of the run")
    parser.add_argument("--ranks", type=int, help="ranks of a run without hostfile (default: one on each GPU, or one)")
    parser.add_argument("--master_port", type=int, default=DEFAULT_PORT, help=f"rank 0's port (default {DEFAULT_PORT})")
    parser.add_argument("--ssh_port", type=int, help="port of the hosts' ssh servers")
    add_run_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 0 if the run would start, else 1.

    Raises:
        UserError: flags that cannot be read.
    """
    run_options = read_run_options(arguments)
    return check(run_options, arguments.hostfile, arguments.ranks, arguments.master_port, arguments.ssh_port)


def check(
    run_options: RunOptions,
    hostfile: str | None = None,
    ranks: int | None = None,
    port: int = DEFAULT_PORT,
    ssh_port: int | None = None,
) -> int:
    """Check everything and print the result, faults marked; 0 if there is none, else 1."""
    quiet_transformers(run_options.verbose_logging)
    gpus = 0 if run_options.no_cuda or not torch.cuda.is_available() else torch.cuda.device_count()
    ranks = ranks or int(os.environ.get("WORLD_SIZE", "0")) or max(1, gpus)
    checked = PreflightState(run_options, None, ranks, ranks, port, ssh_port)
    bad: list[str] = []

    def look(topic: str, function: Callable[[PreflightState], list[str]]) -> None:
        try:
            lines = function(checked)
        except UserError as error:
            bad.append(str(error))
            print(f"{topic:10} FAULT {error}", flush=True)
        except SkipCheck:
            print(f"{topic:10} not checked, because of the faults above", flush=True)
        else:
            for line in lines:
                print(f"{topic:10} {line}", flush=True)

    if hostfile:
        look("hostfile", lambda checked: _read_hosts(checked, Path(hostfile)))
    for topic, function in TOPICS:
        look(topic, function)
    print(f"the run would not start: {plural(len(bad), 'fault')}, see above" if bad else "the run would start")
    return 1 if bad else 0


def _read_hosts(checked: PreflightState, hostfile: Path) -> list[str]:
    checked.hosts = hosts.read_hostfile(hostfile)
    checked.ranks = sum(host.slots for host in checked.hosts)
    checked.ranks_here = max(host.slots for host in checked.hosts)
    return [f"{plural(len(checked.hosts), 'host')}, {plural(checked.ranks, 'rank')}"]


def _config(checked: PreflightState) -> list[str]:
    on_cpu = checked.options.no_cuda or not torch.cuda.is_available()
    bf16 = on_cpu or torch.cuda.is_bf16_supported()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed chooses its accelerator when it is imported
    checked.resolved = resolved = validate_options(checked.options, checked.ranks, "cpu" if on_cpu else "cuda", bf16)
    plan = resolved.plan
    said = ds_config.load(resolved.name)
    lines = [
        f"{resolved.name}: ZeRO stage {resolved.zero_stage}, {resolved.precision}, on {'CPUs' if on_cpu else 'GPUs'}",
        str(plan),
        *(f"note: {note}" for note in resolved.notes),
    ]
    if resolved.options.max_tokens_per_batch:
        lines.append(
            f"cut into micro-batches of at most {resolved.options.max_tokens_per_batch:,} padded tokens on a "
            f"rank: {longest_rows_at_once(resolved.options, plan)} of the longest rows"
        )
    for name in (
        "per_gpu_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "warmup_steps",
        "weight_decay",
        "adam_epsilon",
        "max_grad_norm",
        "seed",
    ):
        keys = [key for key, owner in ds_config.OWNER_OF.items() if owner == name]
        in_config = any(_at(said, key) not in (None, AUTO) for key in keys)
        value = (
            plan.gradient_accumulation_steps
            if name == "gradient_accumulation_steps"
            else getattr(resolved.options, name)
        )
        owner = resolved.name if in_config else checked.options.origin(name)
        if name == "gradient_accumulation_steps" and resolved.options.global_batch_size is not None:
            owner = "from global_batch_size"
        lines.append(f"  {name} {value}   ({owner})")
    return lines


def _at(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _model(checked: PreflightState) -> list[str]:
    facts = model_facts(checked.options)
    head_kind(facts.config, checked.options.qa_head)  # an error where the model has no such head
    require_weights(checked.options)
    checked.facts = facts
    resolved = _known(checked.resolved)
    kind = torch.bfloat16 if _element(resolved) == 2 else torch.float32
    checked.footprint = footprint(
        facts.config,
        longest_rows_at_once(resolved.options, resolved.plan),
        checked.options.max_seq_length,
        kind,
        LoraSettings.of(resolved.options.to_dict()),
    )
    return [f"{facts.config.model_type}, {describe_parameters(checked.footprint)}"]


def _element(resolved: ResolvedConfig) -> int:
    return weight_dtype(resolved.precision).itemsize


def _data(checked: PreflightState) -> list[str]:
    facts, lines = _known(checked.facts), []
    run_options = checked.options
    evaluates = run_options.do_eval or run_options.evaluates_during_training
    for purpose in ("train", "evaluate") if evaluates else ("train",):
        if not run_options.data_file(purpose) and run_options.dataset_name:
            lines.append(f"{purpose}: {run_options.dataset_name} of the hub, read when the run starts")
            continue
        fingerprint, counts = look_up_features(run_options, purpose, facts)
        checked.features[purpose] = fingerprint, counts
        if counts is None:
            lines.append(f"{purpose}: {run_options.data_file(purpose)}, not in the cache: features are built first")
        else:
            lines.append(
                f"{purpose}: {run_options.data_file(purpose)}, {plural(counts['examples'], 'question')}, "
                f"{plural(counts['features'], 'feature')} in the cache ({fingerprint[:12]})"
            )
    if evaluates:
        lines += [f"WARNING: {file} is trained on and evaluated on" for file in trained_and_evaluated(run_options)]
    return lines


def _schedule(checked: PreflightState) -> list[str]:
    resolved = _known(checked.resolved)
    run_options = resolved.options
    _, counts = checked.features.get("train", ("", None))
    if counts is None and run_options.max_steps <= 0:
        return ["steps are known once the features are built (qa-deepspeed prepare builds them)"]
    rows = counts[EPOCH_ROWS] if counts else 0
    steps = checked.steps = total_steps(run_options, rows, resolved.plan)
    rates = learning_rates(run_options, steps)
    peak = max(rates, key=lambda step: rates[step])  # of equal rates the first step
    # Where the features are not built yet, an epoch is taken for longer than the run.
    intervals = checked.intervals = Intervals.of(run_options, steps, epoch_steps(rows, resolved.plan) or steps + 1)
    saves = f"a checkpoint every {intervals.save}" if intervals.save else "no checkpoint"
    if run_options.save_steps == EPOCH and not rows:
        saves = "a checkpoint every epoch"
    lines = [f"{plural(steps, 'optimizer step')}, {saves}, a log line every {intervals.log}"]
    if file_weights(run_options) is not None and counts:
        lines.append(f"{plural(rows, 'row')} an epoch, by the weights of the files")
    if resolved.config.get("scheduler"):
        lines.append(f"learning rate by the config's scheduler, {resolved.config['scheduler'].get('type')}")
    else:
        lines.append(
            f"learning rate {rates[0]:.3g} at the first step, {rates[peak]:.3g} at its peak (step {peak + 1:,}), "
            f"{rates[steps - 1]:.3g} at the last"
        )
    at_end = run_options.do_eval or run_options.evaluates_during_training
    return [*lines, plural(intervals.evaluations(steps) + at_end, "evaluation")]


def learning_rates(run_options: RunOptions, steps: int) -> dict[int, float]:
    """Learning rate by the default schedule, by optimizer step (from 0): of some steps, among them the first, the last
    and the first after the warm-up, where every schedule has its peak."""
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=run_options.learning_rate)
    schedule = default_schedule(stand_in, run_options, steps)
    assert isinstance(schedule, LambdaLR), "get_scheduler gives a function of the step"
    (rule,) = schedule.lr_lambdas
    last = steps - 1
    shown = {last * part // SAMPLED_RATES for part in range(SAMPLED_RATES + 1)} | {min(run_options.warmup_steps, last)}
    return {step: run_options.learning_rate * rule(step) for step in sorted(shown)}


def _memory(checked: PreflightState) -> list[str]:
    resolved, facts = _known(checked.resolved), _known(checked.facts)
    run_options = checked.options
    on_cpu = run_options.no_cuda or not torch.cuda.is_available()
    checked.config = config = ds_config.finish(resolved, checked.steps or 1, ds_config.hidden_size(facts.config))
    accumulation = resolved.plan.gradient_accumulation_steps
    arguments = (_known(checked.footprint), ZeroSettings.of(config), checked.ranks, _element(resolved), accumulation)
    available = free_host_memory()
    if on_cpu:
        wanted = estimate_cpu_memory(*arguments).host * checked.ranks_here
        lines = [
            f"{wanted / GIB:.2f} GiB for {plural(checked.ranks_here, 'rank')} on this host, "
            f"{available / GIB:.2f} GiB free"
        ]
        if wanted > available:
            raise UserError(
                f"{lines[0]}: take fewer ranks, a smaller per_gpu_train_batch_size or another config "
                "(qa-deepspeed plan compares them)"
            )
        return lines
    needed = estimate_memory(*arguments)
    on_device = needed.device(run_options.gradient_checkpointing)
    free, _ = torch.cuda.mem_get_info()
    host = needed.host_of(checked.ranks_here)
    lines = [
        f"{on_device / GIB:.2f} GiB on each GPU, {free / GIB:.2f} GiB free; {host / GIB:.2f} GiB on this "
        f"host, {available / GIB:.2f} GiB free"
    ]
    if on_device > free or host > available:
        raise UserError(
            f"{lines[0]}: take more GPUs, a smaller per_gpu_train_batch_size or another config "
            "(qa-deepspeed plan compares them)"
        )
    return lines


def free_host_memory() -> int:
    """Bytes of host memory that new processes can have."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise UserError("/proc/meminfo has no MemAvailable")


def _disk(checked: PreflightState) -> list[str]:
    model, run_options = _known(checked.footprint), checked.options
    if not run_options.output_dir:
        raise UserError("--output_dir is required (a folder for the model, checkpoints and predictions)")
    every = checked.intervals.save if checked.intervals else 0
    kept = checked.steps // every if every and checked.steps else 1 if run_options.save_steps else 0
    if run_options.save_total_limit is not None:
        kept = min(kept, run_options.save_total_limit) + 1
    one = checkpoint_bytes(model.parameters, model.trained)
    wanted = kept * one + 4 * model.trained
    unbuilt = [purpose for purpose, (_, counts) in checked.features.items() if counts is None]
    inputs = [file for purpose in unbuilt for file in resolve_files(run_options.data_patterns(purpose))]
    wanted += int(CACHE_PER_INPUT * sum(map(os.path.getsize, inputs)))
    free = shutil.disk_usage(_nearest_folder(Path(run_options.output_dir))).free
    line = (
        f"at most {wanted / GIB:.2f} GiB ({plural(kept, 'checkpoint')} of {one / GIB:.2f} GiB, the model), "
        f"{free / GIB:.1f} GiB free"
    )
    if wanted > free:
        raise UserError(f"{line}: make room, or lower the number of checkpoints with --save_total_limit")
    return [line]


def _nearest_folder(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _output(checked: PreflightState) -> list[str]:
    run_options = checked.options
    if not run_options.output_dir:
        raise SkipCheck
    folder = Path(run_options.output_dir)
    nearest = _nearest_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written ({error.strerror}): pass another one") from None
    place = "is there" if folder.exists() else "will be created"
    if folder.exists():
        leave_run_dir(folder, lock_run_dir(folder, run_options), existed=True)
    require_named_checkpoint(run_options)
    if run_options.overwrite_output_dir:
        refuse_overwriting(folder, run_options)
        if not folder.exists():
            return [f"{folder} {place}"]
        return [f"{folder}: an earlier run there will be removed once this one has saved something"]
    fingerprint, counts = checked.features.get("train", ("", None))
    if checked.steps is None or checked.resolved is None or counts is None:
        known_later = "; whether it holds this run is known once the features are built" if folder.exists() else ""
        return [f"{folder} {place}{known_later}"]
    resolved = checked.resolved
    head = head_kind(_known(checked.facts).config, resolved.options.qa_head)
    weights = file_weights(resolved.options)
    identity = run_fingerprint(resolved, fingerprint, checked.steps, head, weights)
    decision = resume_decision(folder, resolved.options, identity)
    words = {
        START: "the run starts at step 0",
        RESUME: "the run resumes from a checkpoint",
        FINISHED: "holds this run, finished: there is nothing to do",
    }
    return [f"{folder} {place}: {words[decision.action]}"]


def _operators(checked: PreflightState) -> list[str]:
    operators = compiled_ops.require(_known(checked.config))
    return [f"compiled when the run starts: {', '.join(operators)}" if operators else "nothing has to be compiled"]


def _port(checked: PreflightState) -> list[str]:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun, which started this, holds the port itself"]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", checked.port))
        except OSError as error:
            raise UserError(
                f"port {checked.port} is taken here ({error.strerror}): pass another --master_port, to the launcher too"
            ) from None
    return [f"{checked.port} is free here"]


def _hosts(checked: PreflightState) -> list[str]:
    found = hosts.faults_of_environment_files()
    if checked.hosts is not None and len(checked.hosts) > 1:
        found += hosts.faults(checked.hosts, checked.ssh_port)
    if found:
        raise UserError("; ".join(found))
    if checked.hosts is None or len(checked.hosts) == 1:
        return ["this one only"]
    return [f"{len(checked.hosts)} answer, with the versions of this one"]


def _launch(checked: PreflightState) -> list[str]:
    if checked.hosts is None or len(checked.hosts) == 1:
        return []
    names = ", ".join(hosts.sent_variables()) or "nothing"
    return [
        f"DeepSpeed's launcher starts {checked.hosts[0].name} as rank 0's host and sends variables that begin with "
        f"{', '.join(hosts.ALWAYS_SENT)}, and from .deepspeed_env {names}"
    ]


TOPICS: tuple[tuple[str, Callable[[PreflightState], list[str]]], ...] = (
    ("config", _config),
    ("model", _model),
    ("data", _data),
    ("schedule", _schedule),
    ("memory", _memory),
    ("disk", _disk),
    ("output", _output),
    ("operators", _operators),
    ("port", _port),
    ("hosts", _hosts),
    ("launch", _launch),
)
"""The checks in order: later ones need what earlier ones found."""


def _known(value: Any) -> Any:
    if value is None:
        raise SkipCheck
    return value
