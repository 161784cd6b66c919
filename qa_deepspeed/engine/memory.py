"""Estimate of one rank's memory in a training run, and of the bytes it moves in an optimizer step.

The terms are those of DeepSpeed 0.19's code for the default optimizer (AdamW, two moments). P is the number of
parameters, T of trained ones (with LoRA the adapters and the head, else all), N the number of ranks, e the size of one
element (4 in float32, 2 in half precision):

    stage   parameters            gradients              optimizer (master weights and moments)
    0       eP                    eT, in half +4T        8T, in half 12T
    1       eP                    eT/N, in half +6T/N    12T/N
    2       eP                    eT/N, in half +6T/N    12T/N
    3       eP/N and gathered     eT/N, in half +4T/N    12T/N

Stage 1 has full gradients, eT, if a step has several micro-batches. In half precision the step makes a float32 copy of
the gradients, at stages 1 and 2 from a flattened one; stages 1 to 3 keep separate master weights even in float32. With
offload the optimizer's part, and float32 gradients 4T/N, are in host memory. Gradients and activations never reach
their full size at the same time: the backward pass frees activations as it makes gradients, and the step's copies come
after it.

Traffic is that of ring algorithms, sent by one rank: an all-reduce of S bytes 2S(N-1)/N, an all-gather or a
reduce-scatter S(N-1)/N. DeepSpeed's stages 1 and 2 all-reduce their gradients by default
(`use_multi_rank_bucket_allreduce`), so that they move half as much again as stage 0; Rajbhandari et al. 2020, section
7, count a reduce-scatter there. Stage 3 gathers all parameters, frozen ones too, twice, or once if all may stay
(`max_live`, `max_reuse`).

With ZeRO++'s secondary partition (hpZ; Wang et al. 2023) the K ranks of a host also keep eP/K, from the
first forward pass of a step to its update. Until then they gather from each other: only the first gather of a step and
the gradients leave the host. Frozen parameters never change and are gathered from all ranks in the first step only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa_deepspeed.engine.compiled_ops import quantizes_messages
from qa_deepspeed.models.footprint import Footprint
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.units import GIB, plural

STAGE_0_BUCKET = 500_000_000
"""Elements that stage 0 flattens and reduces at once (`MEMORY_OPT_ALLREDUCE_SIZE` of DeepSpeed's engine)."""

PROCESS_HOST_BYTES = 300 * 2**20
"""Anonymous host memory of a rank without a model: Python, torch, Transformers and DeepSpeed imported."""

PROCESS_DEVICE_BYTES = 2 * GIB
"""Device memory outside of tensors: the CUDA context, NCCL's channels, kernel workspaces. An allowance."""


@dataclass(frozen=True)
class ZeroSettings:
    """The settings of a DeepSpeed config that decide about memory; sizes in elements, defaults as DeepSpeed's."""

    stage: int
    offload_optimizer: bool
    offload_parameters: bool
    overlap: bool
    reduce_bucket: int
    prefetch_bucket: int
    max_live: int
    reduce_scatter: bool = True
    max_reuse: int = 1_000_000_000
    secondary: int = 1
    """Ranks that keep a secondary partition of the parameters between them (ZeRO++); 1: there is none."""

    @classmethod
    def of(cls, config: dict[str, Any]) -> ZeroSettings:
        """The settings of a config without `"auto"`."""
        section = config.get("zero_optimization", {})
        stage = int(section.get("stage", 0))
        return cls(
            stage=stage,
            offload_optimizer=_offloads(section.get("offload_optimizer")),
            offload_parameters=_offloads(section.get("offload_param")),
            overlap=bool(section.get("overlap_comm", stage == 3)),
            reduce_bucket=int(float(section.get("reduce_bucket_size", 500_000_000))),
            prefetch_bucket=int(float(section.get("stage3_prefetch_bucket_size", 50_000_000))),
            max_live=int(float(section.get("stage3_max_live_parameters", 1_000_000_000))),
            reduce_scatter=bool(section.get("reduce_scatter", True)),
            max_reuse=int(float(section.get("stage3_max_reuse_distance", 1_000_000_000))),
            secondary=int(section.get("zero_hpz_partition_size", 1)) if stage == 3 else 1,
        )


def countable(config: dict[str, Any]) -> bool:
    """Whether this module covers a config: it does not count NVMe, ZeRO++'s quantized messages and torch_autocast's
    copies."""
    zero = config.get("zero_optimization", {})
    devices = [(zero.get(key) or {}).get("device") for key in ("offload_optimizer", "offload_param")]
    return not ("nvme" in devices or quantizes_messages(config) or config.get("torch_autocast", {}).get("enabled"))


def _offloads(section: dict[str, Any] | None) -> bool:
    return bool((section or {}).get("device", "none") != "none")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank. On a GPU rank all but the host's parts are on the device; a CPU rank has all in host memory.

    gradients: at the step, copies included; held: those that stay during the next micro-batch of the same step.
    activations: with all tensors kept; checkpointed: with gradient checkpointing; both are on the device.
    host: in host memory while training; loading: while the weights are read, in float32. At stage 3 every rank copies
    its partitions from the mapped files (safetensors), with one full parameter at a time.
    sent: to other ranks in one optimizer step; spanning: of these, in messages of all ranks, which leave the host where
    there are several; bus: between host and device in one optimizer step.
    """

    parameters: int
    gradients: int
    held: int
    optimizer: int
    buffers: int
    activations: int
    checkpointed: int
    host: int
    loading: int
    sent: int
    spanning: int
    bus: int

    def host_of(self, ranks: int) -> int:
        """Peak host memory of a node with this many ranks."""
        return max(self.host, self.loading) * ranks

    def device(self, checkpointing: bool = False) -> int:
        """Peak device memory of a GPU rank."""
        activations = self.checkpointed if checkpointing else self.activations
        always = self.parameters + self.optimizer + self.buffers + PROCESS_DEVICE_BYTES
        return always + max(self.gradients, self.held + activations)


def estimate_memory(
    model: Footprint, zero: ZeroSettings, ranks: int, element: int, accumulation: int, graphs: bool = False
) -> MemoryEstimate:
    """Estimate for a GPU rank; `element` bytes per parameter, `accumulation` micro-batches per optimizer step.

    With CUDA `graphs` all gradients have a fixed place during the whole run.
    """
    full, partition = model.parameters, -(-model.parameters // ranks)
    trained, trained_partition = model.trained, -(-model.trained // ranks)
    half = element == 2
    partitioned = zero.stage >= 2 or (zero.stage == 1 and accumulation == 1)
    gradients = element * (trained_partition if partitioned else trained)
    held = gradients * (accumulation > 1)
    if half:
        gradients += 4 * (trained if zero.stage == 0 else trained_partition)
        gradients += 2 * trained_partition * (zero.stage in (1, 2))
    if zero.stage == 1 and not zero.overlap:
        gradients = max(gradients, element * trained)  # all are kept to the end of the backward pass
    optimizer = 12 * trained_partition if zero.stage else (8 + 4 * half) * trained
    parameters = element * full
    in_host = element * partition * zero.offload_parameters
    host = PROCESS_HOST_BYTES + in_host
    bus = 2 * accumulation * in_host
    if zero.stage == 3:
        gathered = min(full, max(zero.max_live, model.largest_layer))
        parameters = element * (gathered + partition) - in_host
    if zero.secondary > 1:
        second = element * -(-full // min(zero.secondary, ranks))
        host += second * zero.offload_parameters
        parameters += second * (not zero.offload_parameters)
    if zero.offload_optimizer:
        host += (12 + element + 4) * trained_partition
        bus += (element * accumulation + element) * trained_partition
        gradients, held, optimizer = 0, 0, 0
    if graphs:
        held += element * trained
        gradients += element * trained
    spanning, within = _sent(model, zero, element, ranks, accumulation)
    return MemoryEstimate(
        parameters=parameters,
        gradients=gradients,
        held=held,
        optimizer=optimizer,
        buffers=element * _buffers(model, zero),
        activations=model.saved - model.attention,
        checkpointed=model.checkpointed - model.checkpointed_attention,
        host=host,
        loading=PROCESS_HOST_BYTES + (4 * model.largest_tensor + in_host if zero.stage == 3 else 4 * full),
        sent=spanning + within,
        spanning=spanning,
        bus=bus,
    )


CPU_ATTENTION_RATIO = 5 / 12
"""Attention matrices that models/attention/cpu_attention.py keeps for the backward pass (float32 probabilities, and one
byte per score for dropout), relative to torch's attention (three float32 matrices)."""


def estimate_cpu_memory(
    model: Footprint, zero: ZeroSettings, ranks: int, element: int, accumulation: int
) -> MemoryEstimate:
    """Estimate for a CPU rank, all of it in `host`. Freed blocks are kept for the next step, so that the peak sums
    tensors that are not live together."""
    on_gpu = estimate_memory(model, zero, ranks, element, accumulation)
    partition = -(-model.parameters // ranks)
    buffers = element * _buffers_on_cpu(model, zero, ranks)
    activations = model.saved - int(model.attention * (1 - CPU_ATTENTION_RATIO))
    # The outputs of a frozen module and its adapter are freed when they are added up. Smaller tensors then take
    # parts of their places in glibc's heap, and the next outputs do not fit.
    holes = 2 * model.adapted
    host = on_gpu.parameters + on_gpu.gradients + on_gpu.optimizer + buffers + activations + holes + on_gpu.host
    kept = element * partition if zero.stage == 3 and not zero.offload_parameters else 0
    return dataclasses.replace(
        on_gpu,
        buffers=buffers,
        activations=activations,
        checkpointed=model.checkpointed,
        host=host,
        loading=on_gpu.loading + kept,
        bus=0,
    )


def _buffers_on_cpu(model: Footprint, zero: ZeroSettings, ranks: int) -> int:
    """Elements that DeepSpeed and gloo allocate beside parameters, gradients and optimizer state, as seen in torch's
    profiler. Gathering needs no copy on one host (`dist.gather_by_broadcasts`)."""
    if zero.stage == 0:
        return model.trained  # the flattened gradients
    partition, bucket = -(-model.trained // ranks), min(zero.reduce_bucket, model.trained)
    # The bucket is allocated at another place in every step, so that all its pages are touched. The partition holds
    # zeros, which serve as gradients when the optimizer is initialized.
    buffers = zero.reduce_bucket + partition
    if zero.stage == 3:
        # The assembled bucket and gloo's copy of it, or at other times one gather's buffer; the step's flat gradients.
        buffers += max(2 * bucket, min(zero.prefetch_bucket, model.parameters)) + partition
    else:
        # The flattened bucket and its copy (reduce_scatter), a second bucket while the first is sent.
        buffers += (2 * zero.reduce_scatter + zero.overlap) * bucket
    # The largest gradient of autograd, and DeepSpeed's copy of it.
    return buffers + 2 * model.largest_trained * (zero.offload_optimizer or zero.stage == 3)


def _buffers(model: Footprint, zero: ZeroSettings) -> int:
    """Elements of the communication buffers."""
    if zero.stage == 0:
        return min(model.trained, STAGE_0_BUCKET)
    bucket = max(zero.reduce_bucket, model.largest_trained)
    # The bucket being filled, below stage 3 a second one while the first is sent, and the flattened copy that is sent.
    second, flattened = zero.overlap and zero.stage < 3, zero.reduce_scatter or zero.stage == 3
    return bucket * (1 + second + flattened) + model.largest_trained * zero.offload_optimizer


def _sent(model: Footprint, zero: ZeroSettings, element: int, ranks: int, accumulation: int) -> tuple[int, int]:
    """Bytes that a rank sends in an optimizer step: in messages of all ranks, and of those of a secondary partition."""

    def once(count: int, of: int) -> int:
        return element * count * (of - 1) // of

    gradients = once(model.trained, ranks)
    if zero.stage == 0:
        return 2 * gradients, 0
    if zero.stage < 3:
        return 2 * gradients * (accumulation if zero.stage == 2 else 1) + gradients, 0
    gathers = (1 if model.parameters <= min(zero.max_live, zero.max_reuse) else 2) * accumulation
    if zero.secondary == 1:
        return gathers * once(model.parameters, ranks) + gradients * accumulation, 0
    within = gathers * model.parameters - model.trained
    return once(model.trained, ranks) + gradients * accumulation, once(within, min(zero.secondary, ranks))


_LESS_MEMORY = "a smaller per_gpu_train_batch_size or another config (qa-deepspeed plan compares them)"


def require_host_memory(wanted: int, free: int, ranks: int) -> str:
    """The line about the memory of a host with `ranks` ranks on CPUs, in bytes.

    Raises:
        UserError: it is too little.
    """
    line = f"{wanted / GIB:.2f} GiB for {plural(ranks, 'rank')} on this host, {free / GIB:.2f} GiB free"
    if wanted > free:
        raise UserError(f"{line}: take fewer ranks, {_LESS_MEMORY}")
    return line


def require_gpu_memory(on_device: int, free_on_device: int, on_host: int, free_on_host: int) -> str:
    """The same for a GPU and its host.

    Raises:
        UserError: one of them has too little.
    """
    line = (
        f"{on_device / GIB:.2f} GiB on each GPU, {free_on_device / GIB:.2f} GiB free; {on_host / GIB:.2f} GiB on this "
        f"host, {free_on_host / GIB:.2f} GiB free"
    )
    if on_device > free_on_device or on_host > free_on_host:
        raise UserError(f"{line}: take more GPUs, {_LESS_MEMORY}")
    return line


def free_host_memory() -> int:
    """Bytes of host memory that new processes can have."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise UserError("/proc/meminfo has no MemAvailable: run qa-deepspeed plan, which computes what is needed")
