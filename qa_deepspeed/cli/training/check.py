"""`qa-deepspeed check` and `train --dry_run`: would this run start, and what would it do? No weights are loaded."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qa_deepspeed.config.batch_plan import epoch_steps, longest_rows_at_once, total_steps
from qa_deepspeed.config.intervals import Intervals
from qa_deepspeed.config.option_groups import EPOCH
from qa_deepspeed.config.run_arguments import add_run_arguments, read_run_options
from qa_deepspeed.config.run_options import RunOptions, check_counts
from qa_deepspeed.engine import compiled_ops, ds_config
from qa_deepspeed.engine.checkpoints.checkpoint import checkpoint_bytes
from qa_deepspeed.engine.config_choice import choose_config
from qa_deepspeed.engine.cuda_graphs import uses_graphs
from qa_deepspeed.engine.device import device_for_check
from qa_deepspeed.engine.ds_config import ResolvedConfig
from qa_deepspeed.engine.memory import (
    ZeroSettings,
    estimate_cpu_memory,
    estimate_memory,
    free_host_memory,
    require_gpu_memory,
    require_host_memory,
)
from qa_deepspeed.engine.nvme.swap_files import swap_bytes
from qa_deepspeed.engine.optim import rates_in_words
from qa_deepspeed.models.facts import ModelFacts, model_facts
from qa_deepspeed.models.footprint import Footprint, describe_parameters, footprint
from qa_deepspeed.models.loading import head_kind, load_config, quiet_transformers, require_weights
from qa_deepspeed.models.lora import LoraSettings
from qa_deepspeed.models.packing import packs_by_name
from qa_deepspeed.models.trained_settings import with_stored_settings
from qa_deepspeed.qa.data.reading import resolve_files
from qa_deepspeed.runs.evaluation_folder import refuse_foreign_answers
from qa_deepspeed.runs.folder import OUTPUT_DIR_MISSING, leave_run_dir, lock_run_dir
from qa_deepspeed.runs.identity import run_fingerprint
from qa_deepspeed.runs.preflight import (
    IN_WORDS,
    features_bytes,
    require_room,
    require_swap_room,
    require_writable,
    settings_with_origins,
)
from qa_deepspeed.runs.resume import refuse_overwriting, require_named_checkpoint, resume_decision
from qa_deepspeed.training.distillation import Teacher, find_teachers
from qa_deepspeed.training.evaluation.evaluate import require_folder_for_files
from qa_deepspeed.training.evaluation.scoring import evaluation_options
from qa_deepspeed.training.features import (
    EPOCH_ROWS,
    Purpose,
    file_weights,
    look_up_features,
    warnings_of_files,
)
from qa_deepspeed.training.validate import validate_options
from qa_deepspeed.utils import hosts
from qa_deepspeed.utils.dtypes import weight_dtype
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.units import plural

DEFAULT_PORT = 29500

DEVICES = {"cpu": "CPUs", "cuda": "GPUs"}


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
    teachers: list[Teacher] = field(default_factory=list)
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
    for topic, function in TOPICS if run_options.do_train else EVALUATION_TOPICS:
        look(topic, function)
    print(f"the run would not start: {plural(len(bad), 'fault')}, see above" if bad else "the run would start")
    return 1 if bad else 0


def _read_hosts(checked: PreflightState, hostfile: Path) -> list[str]:
    checked.hosts = hosts.read_hostfile(hostfile)
    checked.ranks = sum(host.slots for host in checked.hosts)
    checked.ranks_here = max(host.slots for host in checked.hosts)
    return [f"{plural(len(checked.hosts), 'host')}, {plural(checked.ranks, 'rank')}"]


def _config(checked: PreflightState) -> list[str]:
    device, bf16 = device_for_check(checked.options.no_cuda)
    checked.resolved = resolved = validate_options(checked.options, checked.ranks, device, bf16)
    plan = resolved.plan
    chosen_later = ds_config.chooses_config(checked.options)
    config = "auto, see the model" if chosen_later else f"{resolved.name}: ZeRO stage {resolved.zero_stage}"
    lines = [
        f"{config}, {resolved.precision}, on {DEVICES[device]}",
        str(plan),
        *(f"note: {note}" for note in resolved.notes),
    ]
    if resolved.options.max_tokens_per_batch:
        lines.append(
            f"cut into micro-batches of at most {resolved.options.max_tokens_per_batch:,} tokens on a "
            f"rank: {longest_rows_at_once(resolved.options, plan)} of the longest rows"
        )
    return [*lines, *settings_with_origins(resolved, checked.options)]


def _evaluation_config(checked: PreflightState) -> list[str]:
    """Of `--do_train false`, which is an evaluation."""
    device, bf16 = device_for_check(checked.options.no_cuda)
    resolved = ds_config.resolve(checked.options, checked.ranks, device, bf16, "zero0")
    options = evaluation_options(resolved.options)
    check_counts(options)
    checked.resolved = dataclasses.replace(resolved, options=options)
    return ["do_train is false: the model is evaluated, in " + resolved.precision]


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
        resolved.options.freeze,
    )
    lines = [f"{facts.config.model_type}, {describe_parameters(checked.footprint)}"]
    if ds_config.chooses_config(checked.options):
        device, bf16 = device_for_check(checked.options.no_cuda)
        where = torch.device(device), checked.ranks, checked.ranks_here
        name, why = choose_config(resolved, facts.config, *where)
        options = dataclasses.replace(checked.options, deepspeed_config=name)
        checked.resolved = validate_options(options, checked.ranks, device, bf16)
        lines.append(f"deepspeed_config auto: {why}")
    return lines


def _evaluated_model(checked: PreflightState) -> list[str]:
    checked.options, _ = with_stored_settings(checked.options, load_config(checked.options))
    checked.facts = facts = model_facts(checked.options)
    head_kind(facts.config, checked.options.qa_head)
    require_weights(checked.options)
    return [str(facts.config.model_type)]


def _element(resolved: ResolvedConfig) -> int:
    return weight_dtype(resolved.precision).itemsize


def _data(checked: PreflightState) -> list[str]:
    facts, lines = _known(checked.facts), []
    run_options = checked.options
    evaluates = run_options.do_eval or run_options.evaluates_during_training
    wanted: dict[Purpose, bool] = {"train": run_options.do_train, "evaluate": evaluates or not run_options.do_train}
    for purpose in (purpose for purpose, needed in wanted.items() if needed):
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
    if evaluates and run_options.do_train:
        lines += warnings_of_files(run_options)
    if "train" in checked.features:
        checked.teachers = find_teachers(run_options, facts)
    for teacher in checked.teachers:
        same = "the student's features" if teacher.features == checked.features["train"][0] else "features of its own"
        lines.append(f"teacher {teacher.name}, {same}: its logits come from the cache, or are computed first")
    return lines


def _schedule(checked: PreflightState) -> list[str]:
    resolved = _known(checked.resolved)
    run_options = resolved.options
    _, counts = checked.features.get("train", ("", None))
    if counts is None and run_options.max_steps <= 0:
        return ["steps are known once the features are built (qa-deepspeed prepare builds them)"]
    rows = counts[EPOCH_ROWS] if counts else 0
    steps = checked.steps = total_steps(run_options, rows, resolved.plan)
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
        lines.append(rates_in_words(run_options, steps))
    at_end = run_options.do_eval or run_options.evaluates_during_training
    return [*lines, plural(intervals.evaluations(steps) + at_end, "evaluation")]


def _memory(checked: PreflightState) -> list[str]:
    resolved, facts = _known(checked.resolved), _known(checked.facts)
    run_options = checked.options
    on_cpu = run_options.no_cuda or not torch.cuda.is_available()
    width = ds_config.hidden_size(facts.config)
    checked.config = config = ds_config.finish(resolved, checked.steps or 1, width, checked.ranks_here)
    accumulation = resolved.plan.gradient_accumulation_steps
    zero = ZeroSettings.of(config)
    arguments = (_known(checked.footprint), zero, checked.ranks, _element(resolved), accumulation)
    available = free_host_memory()
    if on_cpu:
        wanted = estimate_cpu_memory(*arguments).host * checked.ranks_here
        return [require_host_memory(wanted, available, checked.ranks_here)]
    packed = packs_by_name(run_options, facts.config)
    needed = estimate_memory(*arguments, uses_graphs(resolved, "cuda", packed, checked.ranks))
    free, _ = torch.cuda.mem_get_info()
    on_device, on_host = needed.device(run_options.gradient_checkpointing), needed.host_of(checked.ranks_here)
    return [require_gpu_memory(on_device, free, on_host, available)]


def _disk(checked: PreflightState) -> list[str]:
    model, run_options = _known(checked.footprint), checked.options
    if not run_options.output_dir:
        raise UserError(OUTPUT_DIR_MISSING)
    every = checked.intervals.save if checked.intervals else 0
    kept = checked.steps // every if every and checked.steps else 1 if run_options.save_steps else 0
    if run_options.save_total_limit is not None:
        kept = min(kept, run_options.save_total_limit) + 1
    unbuilt = [purpose for purpose, (_, counts) in checked.features.items() if counts is None]
    inputs = [file for purpose in unbuilt for file in resolve_files(run_options.data_patterns(purpose))]
    one, other = checkpoint_bytes(model.parameters, model.trained), 4 * model.trained + features_bytes(inputs)
    folder, resolved = Path(run_options.output_dir), _known(checked.resolved)
    lines = [require_room(folder, kept, one, other)]
    for nvme, size in swap_bytes(resolved.config, model, _element(resolved)).items():
        here = size * checked.ranks_here // checked.ranks
        lines.append(require_swap_room(Path(nvme), here, folder, kept * one + other))
    return lines


def _output(checked: PreflightState) -> list[str]:
    run_options = checked.options
    if not run_options.output_dir:
        raise SkipCheck
    folder = Path(run_options.output_dir)
    require_writable(folder)
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
    digests = [teacher.digest for teacher in checked.teachers]
    weights = file_weights(resolved.options)
    identity = run_fingerprint(resolved, fingerprint, checked.steps, head, weights, digests)
    decision = resume_decision(folder, resolved.options, identity)
    return [f"{folder} {place}: {IN_WORDS[decision.action]}"]


def _evaluation_output(checked: PreflightState) -> list[str]:
    run_options = checked.options
    require_folder_for_files(run_options)
    if not run_options.output_dir:
        return ["the scores are printed, and nothing is written"]
    folder = Path(run_options.output_dir)
    require_writable(folder)
    refuse_foreign_answers(folder, run_options)
    return [f"{folder} gets the answers and scores"]


def _operators(checked: PreflightState) -> list[str]:
    operators = compiled_ops.require(_known(checked.config))
    return [f"compiled when the run starts: {', '.join(operators)}" if operators else "nothing has to be compiled"]


def _port(checked: PreflightState) -> list[str]:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun, which started this, holds the port itself"]
    return [hosts.require_free_port(checked.port)]


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
    return [hosts.launch_in_words(checked.hosts[0])]


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

EVALUATION_TOPICS: tuple[tuple[str, Callable[[PreflightState], list[str]]], ...] = (
    ("config", _evaluation_config),
    ("model", _evaluated_model),
    ("data", _data),
    ("output", _evaluation_output),
    *(topic for topic in TOPICS if topic[0] in ("port", "hosts", "launch")),
)
"""Those of a run with do_train false."""


def _known(value: Any) -> Any:
    if value is None:
        raise SkipCheck
    return value
