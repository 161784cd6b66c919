"""`qa-deepspeed plan`: what a model needs under every shipped DeepSpeed config on given machines, and which to take."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import torch

from qa_deepspeed.config.run_arguments import add_run_arguments, read_run_options
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import ds_config
from qa_deepspeed.engine.config_check import AUTO
from qa_deepspeed.engine.config_choice import Machines, Row, estimate_configs, recommend
from qa_deepspeed.engine.device import choose_device
from qa_deepspeed.engine.flops import measured_peak_flops, training_flops
from qa_deepspeed.engine.nvme.swap_files import nvme_folders, swap_bytes
from qa_deepspeed.models.footprint import Footprint, describe_parameters
from qa_deepspeed.models.loading import load_config, model_from_config, quiet_transformers
from qa_deepspeed.utils.dtypes import LONG_NAMES, weight_dtype
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.units import GIB, gib

SHIPPED_NVME = "zero3_nvme"

UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**n for n, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}iB": 1024**n for n, prefix in enumerate("KMGT", 1)},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `plan`: the machines, and those of a training run."""
    parser.add_argument("--nodes", type=int, default=1, help="machines (default 1)")
    parser.add_argument(
        "--gpus_per_node", type=int, default=1, help="ranks on each, a GPU each, or with --no_cuda none (default 1)"
    )
    parser.add_argument("--gpu_memory", default="80GiB", help="memory of one GPU (default 80GiB)")
    parser.add_argument("--cpu_memory", default="1TiB", help="memory of one machine (default 1TiB)")
    parser.add_argument(
        "--measure_peak",
        "--measure-roof",  # its name before
        action="store_true",
        help="measure this device's matrix throughput and compute the least time of a step; without a model, only that",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_run_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 1 if no config fits, else 0.

    Raises:
        UserError: no such model or config, sizes that cannot be read.
    """
    run_options = read_run_options(arguments)
    for name in ("nodes", "gpus_per_node"):
        if getattr(arguments, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(arguments, name)}")
    machines = Machines(
        arguments.nodes,
        arguments.gpus_per_node,
        None if run_options.no_cuda else parse_size(arguments.gpu_memory, "gpu_memory"),
        parse_size(arguments.cpu_memory, "cpu_memory"),
    )
    quiet_transformers(run_options.verbose_logging)
    peaks = measured_peaks(choose_device(run_options.no_cuda)) if arguments.measure_peak else {}
    if peaks and not run_options.model_name_or_path:
        print(json.dumps({"peak_flops": peaks}) if arguments.json else "\n".join(peak_lines(peaks, None)))
        return 0
    model_config = load_config(run_options)
    model, rows = estimate_configs(run_options, model_config, machines)
    chosen, why = recommend(rows)
    swap_config, swap = swap_bytes_of_node(run_options, model, machines)
    if arguments.json:
        print(json.dumps(_plain(model, rows, chosen, why) | {"peak_flops": peaks, "swap_bytes": swap}))
    else:
        work = step_work(run_options, model_config) if peaks else None
        print("\n".join([*peak_lines(peaks, work), *table(run_options, model, machines, rows, why)]))
        print(f"{swap_config}: swap files of at most {gib(swap)} GiB on the NVMe disks of a node (--nvme_path)")
    return 0 if chosen else 1


def measured_peaks(device: torch.device) -> dict[str, float]:
    """Measured matrix FLOP/s of `device` in each type of training; torch_autocast has those of the half types."""
    kinds = {name: kind for name, kind in LONG_NAMES.items() if device.type == "cuda" or kind != torch.float16}
    return {name: measured_peak_flops(device, kind) for name, kind in kinds.items()}


def step_work(run_options: RunOptions, model_config: Any) -> float:
    """Matrix operations of the forward and backward pass of one full micro-batch."""
    with torch.device("meta"):
        model = model_from_config(copy.deepcopy(model_config), run_options.qa_head)
    by_token, by_pair = training_flops(model, model_config)
    length = run_options.max_seq_length
    return run_options.per_gpu_train_batch_size * (by_token * length + by_pair * length**2)


def swap_bytes_of_node(run_options: RunOptions, model: Footprint, machines: Machines) -> tuple[str, int]:
    """The run's own config if it keeps state on NVMe, else the shipped one that does, and the most bytes of the swap
    files on one node."""
    name = run_options.deepspeed_config or AUTO
    if name == AUTO or not nvme_folders(ds_config.load(name)):
        name = SHIPPED_NVME
    options = dataclasses.replace(run_options, deepspeed_config=name)
    resolved = ds_config.resolve(options, machines.ranks, "cpu" if machines.gpu_memory is None else "cuda")
    sizes = swap_bytes(resolved.config, model, weight_dtype(resolved.precision).itemsize)
    return name, sum(sizes.values()) * machines.ranks_per_node // machines.ranks


def peak_lines(peaks: Mapping[str, float], work: float | None) -> list[str]:
    """A line for each type: measured peak FLOP/s, and the least time of `work` at that rate."""
    lines = []
    for name, peak in peaks.items():
        line = f"measured matrix throughput of this device in {name}: {peak / 1e9:,.0f} GFLOP/s"
        if work is not None:
            line += f"; a micro-batch of {work / 1e9:,.0f} GFLOP takes at least {work / peak:.3g} s"
        lines.append(line)
    return [*lines, ""] if lines else []


def parse_size(text: str, name: str) -> int:
    """Bytes of "80GiB", "80GB", "1.5 TiB".

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = next((size for word, size in UNITS.items() if match and word.lower() == match[2].lower()), None)
    if match is None or unit is None or float(match[1]) == 0:
        raise UserError(f"{name} must be a size like 80GiB or 80GB, not '{text}'")
    return int(float(match[1]) * unit)


def table(run_options: RunOptions, model: Footprint, machines: Machines, rows: list[Row], why: str) -> list[str]:
    """The plan as lines for people; GiB of one rank."""
    on_cpu = machines.gpu_memory is None
    where = f"{machines.cpu_memory / GIB:.0f} GiB a node"
    if machines.gpu_memory is not None:
        where = f"{machines.gpu_memory / GIB:.0f} GiB each, {where}"
    lines = [
        f"{run_options.model_name_or_path}: {describe_parameters(model)}; {run_options.per_gpu_train_batch_size} "
        f"rows of {run_options.max_seq_length} tokens on each of {machines.ranks} "
        f"{'CPU ranks' if on_cpu else 'GPUs'} ({machines.nodes} x {machines.ranks_per_node}), {where}",
        "GiB of one rank" + ("" if model.counted else "; activations estimated by formula, not counted"),
        "",
    ]
    head = [
        "config",
        "parameters",
        "gradients",
        "optimizer",
        "buffers",
        "activations",
        "checkpointed",
        *(("host", "loading") if on_cpu else ("device", "host")),
        "sent/step",
        *(("between nodes",) if machines.nodes > 1 else ()),
        "bus/step",
        "fits",
    ]
    body = [head]
    for row in rows:
        n = row.need
        first = n.host if on_cpu else n.device()
        second = n.loading if on_cpu else n.host_of(1)
        numbers = (
            n.parameters,
            n.gradients,
            n.optimizer,
            n.buffers,
            n.activations,
            n.checkpointed,
            first,
            second,
            n.sent,
            *((n.spanning,) if machines.nodes > 1 else ()),
            n.bus,
        )
        fits = "yes" if row.fits else "checkpointed" if row.fits_checkpointed else f"no, lacks {row.lacks}"
        body.append([row.config, *map(gib, numbers), fits])
    widths = [max(len(line[column]) for line in body) for column in range(len(head))]
    for line in body:
        cells = [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True)]
        lines.append(f"{line[0]:<{widths[0]}}  {'  '.join(cells)}  {line[-1]}")
    return [*lines, "", why]


def _plain(model: Footprint, rows: list[Row], chosen: Row | None, why: str) -> dict[str, Any]:
    return {
        "model": dataclasses.asdict(model),
        "configs": [dataclasses.asdict(row) for row in rows],
        "recommended": chosen.config if chosen else None,
        "why": why,
    }
