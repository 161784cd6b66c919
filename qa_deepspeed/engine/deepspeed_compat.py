"""Private names of DeepSpeed, each behind a function with a plain name; nothing else here uses them.

`check_supported` looks for all of them at start. In this order: the engine, partitioned parameters (ZeRO-3), the
optimizers of each stage, the files of a checkpoint, the config.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib
import inspect
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.supported import names_used_in, require_names, unsupported

NAMES = {
    "deepspeed.ops": "__compatible_ops__",
    "deepspeed.comm.comm": "cdb",
    "deepspeed.comm.torch:TorchBackend": "all_gather_function",
    "deepspeed.runtime.engine:DeepSpeedEngine": """
        checkpoint_engine _copy_recovery_script save_non_zero_checkpoint _zero3_consolidated_16bit_state_dict
        param_names global_samples skipped_steps
    """,
    "deepspeed.runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer": "fp32_groups fp16_groups clip_grad",
    "deepspeed.runtime.fp16.fused_optimizer:FP16_Optimizer": "fp32_groups_flat fp16_groups_flat",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer": """
        single_partition_of_fp32_groups bit16_groups update_lp_params _hp_mapping clip_grad
    """,
    "deepspeed.utils.groups": "_ZERO_PARAM_INTRA_PARALLEL_GROUP",
    "deepspeed.utils.tensor_fragment": "fragment_address",
    "deepspeed.utils.tensor_fragment:tensor_fragment": "get_hp_fragment_address lp_fragment_address",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3": """
        swap_optimizer checkpoint_event_prologue checkpoint_event_epilogue fp16_groups fp32_partitioned_groups_flat
        fp16_partitioned_groups_flat fp16_partitioned_groups persistent_parameters unflatten clip_grad
    """,
    "deepspeed.runtime.zero.partition_parameters:Init": """
        ds_tensor ds_shape ds_numel ds_quant_scale ds_secondary_tensor final_location partition_numel
    """,
    "deepspeed.runtime.zero.parameter_offload": "FWD_MODULE_STACK",
    "deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator": """
        _PartitionedParameterCoordinator__params_to_release
    """,
    "deepspeed.runtime.fp16.loss_scaler": "LossScaler DynamicLossScaler",
    "deepspeed.runtime.zero.config": "ZeroStageEnum",
    "deepspeed.runtime.zero.stage_1_and_2": "is_invalid_grad_norm",
    "deepspeed.runtime.zero.stage3": "is_invalid_grad_norm",
    "deepspeed.runtime.fp16.unfused_optimizer": "is_invalid_grad_norm",
}
"""Module or "module:class" -> names in it."""

NORM_READERS = [place for place, names in NAMES.items() if names == "is_invalid_grad_norm"]
"""Modules whose optimizers read the gradient norm of every step."""

TORCH_NAMES = {
    "torch.optim.lr_scheduler:LambdaLR": "_last_lr",
    "torch.utils.file_baton:FileBaton": "lock_file_path",
}
"""The same of torch, for the schedule that DeepSpeed drives and the locks of the operators that it compiles."""

CHECKPOINT_KEYS = {
    "OPTIMIZER_STATE_DICT": "optimizer_state_dict",
    "FP32_GROUPS": "fp32_groups",
    "FP32_FLAT_GROUPS": "fp32_flat_groups",
    "BASE_OPTIMIZER_STATE": "base_optimizer_state",
    "SINGLE_PARTITION_OF_FP32_GROUPS": "single_partition_of_fp32_groups",
    "PARAM_SLICE_MAPPINGS": "param_slice_mappings",
    "PARAM_SHAPES": "param_shapes",
    "FROZEN_PARAM_SHAPES": "frozen_param_shapes",
    "FROZEN_PARAM_FRAGMENTS": "frozen_param_fragments",
    "ZERO_FILE_PREFIX": "zero_pp_rank_",
    "MODEL_FILE_PREFIX": "mp_rank_",
    "MODEL_FILE_SUFFIX": "_model_states.pt",
    "OPTIM_FILE_SUFFIX": "_optim_states.pt",
}
"""Constants of deepspeed.checkpoint.constants, with the texts that are in checkpoints."""

LOSS_SCALE_EXHAUSTED = "loss scale already at minimum"
"""Part of the message of the plain Exception that DeepSpeed raises."""


@functools.cache
def check_supported() -> None:
    """Check once in a process that all private names of DeepSpeed are there. Imports DeepSpeed (2 to 3 s).

    Raises:
        UserError: one is missing, or a text of DeepSpeed's is another.
    """
    require_names("deepspeed", {place: names.split() for place, names in NAMES.items()})
    require_names("torch", {place: names.split() for place, names in TORCH_NAMES.items()})
    constants = importlib.import_module("deepspeed.checkpoint.constants")
    for name, text in CHECKPOINT_KEYS.items():
        if getattr(constants, name, None) != text:
            raise unsupported("deepspeed", f"uses another checkpoint key than '{text}' ({name})")
    texts = names_used_in(importlib.import_module("deepspeed.runtime.fp16.loss_scaler").DynamicLossScaler)
    if not any(LOSS_SCALE_EXHAUSTED in text for text in texts):
        raise unsupported("deepspeed", f"has no message '{LOSS_SCALE_EXHAUSTED}'")


# The engine


def skip_shared_memory_operator(deepspeed: Any) -> None:
    """Keep DeepSpeed from compiling its operator for shared memory, which only inference uses."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def gather_by(deepspeed: Any, function: Callable[..., Any]) -> None:
    """Make DeepSpeed gather parameters by `function` instead of torch.distributed.all_gather_into_tensor."""
    deepspeed.comm.comm.cdb.all_gather_function = function


@contextlib.contextmanager
def build_locks_by(make: Callable[[Path], Any]) -> Iterator[None]:
    """Inside, torch locks the folder of an extension that it builds or loads by `make(path of its lock file)`.

    The result has the methods of torch's own lock: `try_acquire` (whether this process builds), `wait` (until the
    other one has built), `release`. They are replaced on the class: the module that uses it is imported at a build.
    """
    from torch.utils.file_baton import FileBaton

    locks: dict[Any, Any] = {}

    def method(name: str) -> Callable[[Any], Any]:
        def call(baton: Any) -> Any:
            if baton not in locks:
                locks[baton] = make(Path(baton.lock_file_path))
            return getattr(locks[baton], name)()

        return call

    own: dict[str, Any] = {name: getattr(FileBaton, name) for name in ("try_acquire", "wait", "release")}
    for name in own:
        setattr(FileBaton, name, method(name))
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(FileBaton, name, value)


def checkpoint_writer(engine: Any) -> Any:
    """The object by which an engine writes checkpoint files."""
    return engine.checkpoint_engine


def set_checkpoint_writer(engine: Any, writer: Any) -> None:
    """Make an engine write checkpoint files by `writer`, which has the methods of `checkpoint_writer`."""
    engine.checkpoint_engine = writer


def skip_recovery_scripts(engine: Any) -> None:
    """Keep an engine from copying its scripts beside the shards: they would not pass through the writer."""
    engine._copy_recovery_script = lambda save_path: None


def write_common_states(engine: Any) -> None:
    """Make this rank write the non-partitioned state too, as rank 0 does."""
    engine.save_non_zero_checkpoint = True


def consolidated_state_dict(engine: Any) -> dict[str, torch.Tensor] | None:
    """The full state dict of a ZeRO-3 engine on the CPU of rank 0, None elsewhere. Collective."""
    state: dict[str, torch.Tensor] | None = engine._zero3_consolidated_16bit_state_dict()
    return state


def parameter_names(engine: Any) -> dict[torch.Tensor, str]:
    """Parameter -> name in the model."""
    names: dict[torch.Tensor, str] = engine.param_names
    return names


def release(engine: Any) -> None:
    """Let the memory of an engine be freed when nothing else refers to it; it cannot be used any more. Not collective.

    DeepSpeed keeps the model of a ZeRO-3 engine in a list of the process and as a key of a cache, and the hooks of
    ZeRO-1 to 3 on gradients, which Python's garbage collector does not see, refer to the optimizer.
    """
    engine.destroy()
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    modules = parameter_offload.FWD_MODULE_STACK
    modules[:] = [module for module in modules if module is not engine.module]
    of_steps = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(of_steps).nonlocals["func"].cache_clear()  # engines in use compute theirs again


def set_counters(engine: Any, steps: int, samples: int, skipped: int) -> None:
    """Set an engine's counts of steps, samples and skipped steps."""
    engine.global_steps, engine.global_samples, engine.skipped_steps = steps, samples, skipped


def is_loss_scale_exhausted(error: Exception) -> bool:
    """Whether DeepSpeed raised this because float16 overflows at the smallest loss scale."""
    return LOSS_SCALE_EXHAUSTED in str(error)


@contextlib.contextmanager
def norms_unread() -> Iterator[None]:
    """Inside, DeepSpeed's optimizers do not ask whether a gradient norm is finite: two to three times a step the host
    would wait for the device. training/nonfinite_loss.py ends a run after such a norm; float16 needs the answer."""
    modules: list[Any] = [importlib.import_module(place) for place in NORM_READERS]
    originals = [module.is_invalid_grad_norm for module in modules]
    for module in modules:
        module.is_invalid_grad_norm = lambda norm: False
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.is_invalid_grad_norm = original


def set_gradient_clipping(optimizer: Any, norm: float) -> None:
    """Set the norm that DeepSpeed's optimizer wrapper clips to; one of torch's own has no such setting."""
    if hasattr(optimizer, "clip_grad"):
        optimizer.clip_grad = norm


def restart_schedule(schedule: Any, base_rates: list[float], updates: int) -> list[float]:
    """Set a LambdaLR of torch to its state after this many updates; returns the learning rates of the groups."""
    schedule.base_lrs, schedule.last_epoch = base_rates, updates
    rates = [base * rule(updates) for base, rule in zip(base_rates, schedule.lr_lambdas, strict=True)]
    schedule._last_lr = rates
    return rates


# Partitioned parameters (ZeRO-3)


def forget_secondary_group(deepspeed: Any) -> None:
    """Let the next model have a group of ranks for its secondary partition (ZeRO++): DeepSpeed makes it but once."""
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def full_shape(parameter: Any) -> torch.Size:
    """A parameter's shape; of one that ZeRO-3 has partitioned the full one."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def full_numel(parameter: Any) -> int:
    """A parameter's number of elements; of one that ZeRO-3 has partitioned the full one."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def partition_of(parameter: Any) -> torch.Tensor | None:
    """This rank's partition `[elements]` of a parameter, padded at its end; None if ZeRO-3 has not partitioned it."""
    partition: torch.Tensor | None = getattr(parameter, "ds_tensor", None)
    return partition


def place_of_partition(parameter: Any, rank: int) -> tuple[int, int]:
    """First element and number of elements of the full parameter that the partition of `rank` holds.

    What follows them in the partition is padding, which DeepSpeed does not initialize: it may hold NaN.
    """
    size, full = parameter.ds_tensor.numel(), full_numel(parameter)
    begin = min(rank * size, full)
    return begin, min(size, full - begin)


def is_plain_partition(parameter: Any) -> bool:
    """Whether writing into `partition_of` suffices: no partition on NVMe, quantized, or with a second copy (ZeRO++)."""
    partition = parameter.ds_tensor
    quantized = hasattr(partition, "ds_quant_scale")
    return partition.final_location is None and not quantized and parameter.ds_secondary_tensor is None


TORCH_LINEAR = torch.nn.functional.linear
"""torch's linear operation, taken before DeepSpeed replaces it."""


@contextlib.contextmanager
def torch_linear() -> Iterator[None]:
    """Inside, linear layers use torch's operation, as at the other ZeRO stages.

    For ZeRO-3, DeepSpeed replaces `torch.nn.functional.linear` in the whole process by an operation that saves no
    weight for the backward pass. It adds the bias after the product is rounded, so that logits differ in the last bits
    on processors where torch's kernel starts from the bias; without a backward pass it saves no memory.
    """
    replaced = torch.nn.functional.linear
    torch.nn.functional.linear = TORCH_LINEAR
    try:
        yield
    finally:
        torch.nn.functional.linear = replaced


# The optimizers


def master_weights(optimizer: Any) -> dict[torch.Tensor, torch.Tensor] | None:
    """Stage 0 in half precision: parameter -> float32 copy. None for a wrapper that keeps them in another way."""
    groups = getattr(optimizer, "fp32_groups", None)
    if groups is None:
        return None
    masters: dict[torch.Tensor, torch.Tensor] = {}
    for parameters, copies in zip(optimizer.fp16_groups, groups, strict=True):
        masters |= zip(parameters, copies, strict=True)
    return masters


def forget_initial_step(optimizer: Any) -> None:
    """Stage 0 in half precision: take back the step on zero gradients that DeepSpeed makes to allocate the state.

    Without this, Adam's bias correction is one step ahead (the first update is 0.74 of the right one with the usual
    betas), and weight decay is applied once more. The state is allocated again at the first step.
    """
    flat, masters = getattr(optimizer, "fp32_groups_flat", None), master_weights(optimizer)
    if flat is not None:
        pairs = list(zip(optimizer.fp16_groups_flat, flat, strict=True))
    elif masters is not None:
        pairs = list(masters.items())
    else:
        return
    inner = optimizer.optimizer
    inner.state.clear()
    for group in inner.param_groups:
        group.pop("step", None)  # where fused optimizers count
    with torch.no_grad():
        for half, master in pairs:
            master.copy_(half)


@dataclass(frozen=True)
class Slice:
    """A stretch of a parameter in this rank's flat tensor: elements [source, source + count) stand at `target`."""

    parameter: torch.Tensor
    source: int
    target: int
    count: int


def slices(optimizer: Any) -> list[tuple[torch.Tensor, list[Slice]]]:
    """Stages 1 and 2: the flat float32 tensor of each group on this rank, and what of each parameter lies in it."""
    found = []
    for flat, parameters in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        inside = []
        for parameter in parameters:
            link = parameter._hp_mapping
            if link is not None:  # else all of it belongs to other ranks
                full, here = link.lp_fragment_address, link.get_hp_fragment_address()
                inside.append(Slice(parameter, full.start, here.start, here.numel))
        found.append((flat, inside))
    return found


def publish_slices(optimizer: Any) -> None:
    """Stages 1 and 2: give the parameters the values of the flat float32 tensors. Collective."""
    optimizer.update_lp_params()


def keeps_state_on_nvme(optimizer: Any) -> bool:
    """Stage 3: whether the optimizer's state is swapped to NVMe."""
    return bool(getattr(optimizer, "swap_optimizer", False))


def partitions(optimizer: Any, rank: int) -> list[tuple[torch.Tensor, list[Slice]]]:
    """Stage 3: the flat float32 tensor of each sub-group on this rank, and what of each parameter lies in it."""
    found = []
    for flat, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        inside, target = [], 0
        for parameter in parameters:
            size = parameter.partition_numel()
            source = min(rank * size, parameter.ds_numel)
            inside.append(Slice(parameter, source, target, min(size, parameter.ds_numel - source)))  # less the padding
            target += size
        found.append((flat, inside))
    return found


def publish_partitions(optimizer: Any) -> None:
    """Stage 3: give the parameters' partitions the values of the flat float32 tensors."""
    flats = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True)
    for (flat, half), parts in zip(flats, optimizer.fp16_partitioned_groups, strict=True):
        half.data.copy_(flat.data)
        for part, value in zip(parts, optimizer.unflatten(half, parts), strict=True):
            part.data = value.data
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)


@contextlib.contextmanager
def all_partitioned(optimizer: Any) -> Iterator[None]:
    """Stage 3: inside, every parameter is partitioned, those too that stay gathered otherwise. Collective."""
    optimizer.checkpoint_event_prologue()
    yield
    optimizer.checkpoint_event_epilogue()


@contextlib.contextmanager
def without_glob_characters(folder: Path) -> Iterator[Path]:
    """A path to `folder` for load_checkpoint, which DeepSpeed passes to glob: a link if it has `*`, `?` or `[`."""
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place) / "checkpoints"
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield link


# The files of a checkpoint; DeepSpeed's checkpoint/ds_to_universal.py and utils/zero_to_fp32.py read the same


def model_file(stage: int, rank: int = 0) -> str:
    """Name of the file with the model's state; stage 3 has one for each rank."""
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"


def optimizer_files(rank: int) -> str:
    """Pattern of the name of a rank's file with its part of the optimizer's state; none at stage 0."""
    return f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


@contextlib.contextmanager
def plain_values_only() -> Iterator[None]:
    """Inside, torch.load reads tensors, plain values and a few of DeepSpeed's classes, whatever it is passed.

    Raises:
        UserError: a file holds anything else, which is not loaded (a pickle could run any program).
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"a file of the checkpoint holds {named[1] if named else 'Python objects'}, which no checkpoint of this "
            "trainer has: it is not loaded; take another checkpoint"
        ) from None
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def read_checkpoint_file(path: Path) -> dict[str, Any]:
    """A checkpoint file, mapped into memory: what is not used is not read."""
    with plain_values_only():
        content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return content


@dataclass(frozen=True)
class CommonState:
    """What a checkpoint's `model_file` holds.

    module: the model's state dict, at stage 3 with empty tensors. aliases: entry of it -> entry whose tensor it shares.
    steps, samples, skipped, schedule: counts, and the state of the learning-rate schedule. Stage 0: masters, the
    trained parameters in float32 (none if they are float32 anyway), and optimizer, their states by place. Stage 3:
    trained_shapes by sub-group, frozen_shapes, and frozen_partitions, which are the writing rank's.
    """

    module: dict[str, torch.Tensor]
    aliases: dict[str, str]
    steps: int
    samples: int
    skipped: int
    schedule: dict[str, Any] | None
    masters: list[torch.Tensor]
    optimizer: dict[int, dict[str, Any]]
    trained_shapes: list[dict[str, torch.Size]]
    frozen_shapes: dict[str, torch.Size]
    frozen_partitions: dict[str, torch.Tensor]


def read_common_state(checkpoint: Path, stage: int, rank: int = 0) -> CommonState:
    """The state in a checkpoint's model file, of `rank` where each rank has one."""
    saved = read_checkpoint_file(checkpoint / model_file(stage, rank))
    optimizer = saved["optimizer"] if stage == 0 else {"state": {}}
    return CommonState(
        module=saved["module"],
        aliases=saved["shared_params"] or {},
        steps=int(saved["global_steps"]),
        samples=int(saved["global_samples"]),
        skipped=int(saved["skipped_steps"]),
        schedule=saved["lr_scheduler"],
        masters=[tensor for group in optimizer.get("fp32_groups", []) for tensor in group],
        optimizer=optimizer.get("optimizer_state_dict", optimizer)["state"],
        trained_shapes=saved["param_shapes"] if stage == 3 else [],
        frozen_shapes=(saved["frozen_param_shapes"] or {}) if stage == 3 else {},
        frozen_partitions=saved.get("frozen_param_fragments") or {},
    )


def saved_slices(content: dict[str, Any]) -> list[tuple[torch.Tensor, dict[str, Any], dict[str, tuple[int, int]]]]:
    """Stages 1 and 2: of each group the flat float32 tensor, its optimizer state, and (start, count) by parameter."""
    states = content["optimizer_state_dict"]
    base = states["base_optimizer_state"]
    base = base["state"] if isinstance(base, dict) else base
    flats, mappings = states["single_partition_of_fp32_groups"], states["param_slice_mappings"]
    return [
        (flat, base[group], {name: (place.start, place.numel) for name, place in mapping.items()})
        for group, (flat, mapping) in enumerate(zip(flats, mappings, strict=True))
    ]


def saved_partitions(content: dict[str, Any]) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Stage 3: of each sub-group the flat float32 tensor and its optimizer state."""
    states = content["optimizer_state_dict"]
    inner = states["optimizer_state_dict"]["state"]
    return [(flat, inner[group]) for group, flat in enumerate(states["fp32_flat_groups"])]
