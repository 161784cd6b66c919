"""The DeepSpeed engine, as the training loop and the evaluation use it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.utils.import_utils import is_flash_attn_2_available

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import deepspeed_compat as compat
from qa_deepspeed.engine.checkpoints.shard_writer import ShardWriter
from qa_deepspeed.engine.checkpoints.shards import Shards, fill_engine, load_own_shard
from qa_deepspeed.engine.compiled_ops import builds_reported
from qa_deepspeed.engine.config_check import without_secrets
from qa_deepspeed.engine.ds_config import ResolvedConfig
from qa_deepspeed.engine.flops import measured_peak_flops, training_flops
from qa_deepspeed.engine.nvme import nvme_compat
from qa_deepspeed.engine.optim import decays, default_optimizer, default_schedule, groups_of_run, works_elementwise
from qa_deepspeed.models.attention.row_attention import set_row_attention, speed_up_on_cpu
from qa_deepspeed.models.compiled_layers import compile_layers
from qa_deepspeed.models.flat_parameters import FlatNames, flat_names, flatten
from qa_deepspeed.models.transformers_compat import supports_flash_attention
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.dtypes import dtype_named, weight_dtype
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.units import plural


def import_deepspeed(verbose: bool) -> Any:
    """Import DeepSpeed (3 s) after the device is chosen and the process group is joined; quiet unless `verbose`.

    Its shared-memory operator, which only inference uses, is disabled: on CPUs it would be compiled at every start and
    leave files in /dev/shm. CPU ranks of one host gather by broadcasts (`dist.gather_by_broadcasts`).
    """
    if not verbose:
        # DeepSpeed calls collectives by old names, for which torch warns once per name and rank
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.INFO if verbose else logging.ERROR)
    compat.check_supported()
    compat.skip_shared_memory_operator(deepspeed)
    deepspeed.init_distributed(verbose=verbose)  # joins the existing group; ZeRO-3's parameters need it
    if os.environ.get("DS_ACCELERATOR") == "cpu" and 1 < dist.world_size() == dist.local_world_size():
        compat.gather_by(deepspeed, dist.gather_by_broadcasts)
    return deepspeed


class EvalModel:
    """A model for forward passes: complete on this rank, or partitioned over the ranks under ZeRO-3.

    `module` is the Transformers model.
    """

    def __init__(self, module: torch.nn.Module, resolved: ResolvedConfig, device: torch.device) -> None:
        self.module = module
        self.device = device
        self.zero_stage = resolved.zero_stage
        self.precision = resolved.precision
        self._autocast_dtype = dtype_named(resolved.config.get("torch_autocast", {}).get("dtype", "bfloat16"))

    def eval_forward(self, inputs: dict[str, torch.Tensor]) -> Any:
        """The model's outputs, without dropout and gradients. Collective under ZeRO-3.

        ZeRO-3 replaces parameters in place, which inference mode forbids.
        """
        no_grad = torch.no_grad if self.zero_stage == 3 else torch.inference_mode
        autocast = torch.autocast(self.device.type, self._autocast_dtype, enabled=self.precision == "torch_autocast")
        with no_grad(), autocast, compat.torch_linear():
            return self.module(**inputs)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode (no dropout); afterwards the previous mode is restored."""
        training = self.module.training
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(training)

    def close(self) -> None:
        """Let go of the model, which cannot be used any more: its memory is free when nothing else refers to it."""


class Engine(EvalModel):
    """A model in training under DeepSpeed."""

    def __init__(
        self,
        deepspeed_engine: Any,
        resolved: ResolvedConfig,
        device: torch.device,
        flops: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """flops: as `flops.training_flops` of the model."""
        super().__init__(deepspeed_engine.module, resolved, device)
        self.training_flops = flops
        self._engine = deepspeed_engine
        self._options = resolved.options
        deepspeed_engine.config = without_secrets(deepspeed_engine.config)  # DeepSpeed saves it in every checkpoint
        self._writer = ShardWriter(compat.checkpoint_writer(deepspeed_engine))
        if compat.checkpoint_writer(deepspeed_engine) is not None:  # as it is where there is no optimizer
            compat.set_checkpoint_writer(deepspeed_engine, self._writer)
        compat.skip_recovery_scripts(deepspeed_engine)  # `qa-deepspeed export` does their work
        nvme_compat.save_state_in_shards(deepspeed_engine)
        self.grad_norm: float | None = None
        self._initial_groups = [
            {name: value for name, value in group.items() if name not in ("params", "lr", "step")}
            for group in getattr(deepspeed_engine.optimizer, "param_groups", [])  # none where it only evaluates
        ]
        self._initial_rates = list(getattr(deepspeed_engine.lr_scheduler, "base_lrs", []))

    def close(self) -> None:
        """As `EvalModel.close`. Not collective."""
        compat.release(self._engine)

    @property
    def parameters(self) -> int:
        """Number of parameters of the full model, on all ranks together."""
        return sum(compat.full_numel(parameter) for parameter in self.module.parameters())

    @property
    def trained_parameters(self) -> int:
        """Number of parameters that are trained: all, or LoRA's adapters and the head."""
        trained = (parameter for parameter in self.module.parameters() if parameter.requires_grad)
        return sum(compat.full_numel(parameter) for parameter in trained)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next optimizer step."""
        return float(self._engine.optimizer.param_groups[0]["lr"])

    @property
    def loss_scale(self) -> float:
        """The fp16 loss scale; 1 in other precisions."""
        return float(self._engine.optimizer.loss_scale) if self.precision == "fp16" else 1.0

    def measured_peak_flops(self) -> float:
        """Measured peak FLOP/s of this rank's device in matrix products of the training's dtype."""
        dtype = self._autocast_dtype if self.precision == "torch_autocast" else weight_dtype(self.precision)
        return measured_peak_flops(self.device, dtype)

    def train_forward(self, inputs: dict[str, torch.Tensor]) -> Any:
        """The model's outputs, with dropout and gradients."""
        return self._engine(**inputs)

    def as_forward(self, compute: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        """What `compute` returns, as the result of a forward pass of DeepSpeed's engine, which prepares the backward
        pass by it. `compute` may call the model."""

        def instead(*arguments: Any) -> torch.Tensor:
            del self.module.forward
            return compute(*arguments)

        self.module.forward = instead
        result: torch.Tensor = self._engine(*arguments)
        return result

    def begin_micro_batch(self, last: bool) -> None:
        """Call before each forward: `last` if the optimizer step ends with this micro-batch."""
        self._engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one micro-batch's loss, which DeepSpeed divides by the accumulation steps."""
        self._engine.backward(loss)

    def step(self, want_norm: bool) -> None:
        """End a micro-batch; after the last one of an optimizer step, clip, update and advance the schedule.

        With `want_norm`, `grad_norm` is then the norm before clipping. DeepSpeed computes none in float32 at ZeRO-0: it
        is computed here.
        """
        want_norm = want_norm and self._engine.is_gradient_accumulation_boundary()
        norm: Any = None
        if want_norm and self.zero_stage == 0 and self.precision in ("fp32", "torch_autocast"):
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        unread = contextlib.nullcontext() if self.precision == "fp16" else compat.norms_unread()
        try:
            with unread:
                self._engine.step()
        except Exception as error:  # DeepSpeed raises a plain Exception
            if not compat.is_loss_scale_exhausted(error):
                raise
            raise UserError(
                f"float16 overflows at the smallest loss scale, {self.loss_scale}: lower --learning_rate, or use "
                "--bf16 or float32; earlier checkpoints are valid"
            ) from None
        if want_norm:
            norm = norm if norm is not None else self._engine.get_global_grad_norm()
            self.grad_norm = float(norm) if norm is not None else None

    @property
    def gradient_norm(self) -> torch.Tensor | float | None:
        """The norm of the last step's gradient if DeepSpeed computed one, on the device where that needs no wait.

        None in float16, where an infinite gradient is usual: it lowers the loss scale.
        """
        norm: torch.Tensor | float | None = self._engine.get_global_grad_norm()
        return None if self.precision == "fp16" else norm

    def weights_norm(self) -> torch.Tensor:
        """The norm of this rank's trained weights, under ZeRO-3 of its partitions: finite if they are.

        A scalar on the device, read without a synchronization.
        """
        parts = []
        with nvme_compat.partitions_readable(self.module.parameters()):
            for parameter in self.module.parameters():
                partition = compat.partition_of(parameter)
                if partition is not None:
                    partition = partition.narrow(0, 0, compat.place_of_partition(parameter, dist.rank())[1])
                if parameter.requires_grad:
                    parts.append((parameter if partition is None else partition).detach())
            return torch.nn.utils.get_total_norm(parts)

    def full_state_dict(self) -> dict[str, torch.Tensor] | None:
        """The full state dict of the model on the CPU of rank 0, None elsewhere. Collective."""
        if self.zero_stage == 3:
            return compat.consolidated_state_dict(self._engine)
        if not dist.is_rank_zero():
            return None
        state = {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()}
        # safetensors refuses tensors that share memory, as those of a flat parameter do
        flats = {name for tensors in self.flat_names.values() for name in tensors}
        return {name: tensor.clone() if name in flats else tensor for name, tensor in state.items()}

    def save_shards(self, folder: Path, tag: str) -> None:
        """Write DeepSpeed's checkpoint files to folder/tag. Collective; all ranks return, also if one's write fails.

        Raises:
            OSError: this rank could not write its files.
        """
        self._writer.problem = None
        with nvme_compat.state_readable(self._engine):
            self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        if self._writer.problem is not None:
            raise self._writer.problem

    def copy_shards(self, folder: Path, tag: str) -> Callable[[], None]:
        """Copy what `save_shards` writes to host memory; returns what writes it, which no other rank takes part in, and
        which raises an OSError as it does. Collective."""
        with self._writer.copying() as write, nvme_compat.state_readable(self._engine):
            self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        return write

    def write_common_states(self) -> None:
        """Make this rank also write the non-partitioned state (node-local disks)."""
        compat.write_common_states(self._engine)

    def load_shards(self, folder: Path, tag: str) -> bool:
        """Load the files of `save_shards`, written at the same world size. Collective.

        Returns whether it did: state on NVMe has the sub-groups of the config's sub_group_size.
        """
        if nvme_compat.swaps(self._engine.optimizer):
            common = load_own_shard(self._engine, folder / tag)
            if common is not None:
                self.apply_options(common.steps - common.skipped)
            return common is not None
        with compat.without_glob_characters(folder) as plain:
            loaded, _ = self._engine.load_checkpoint(str(plain), tag=tag)
        assert loaded is not None, f"DeepSpeed found no checkpoint in {folder / tag}"
        return True

    @property
    def config(self) -> dict[str, Any]:
        """The config that DeepSpeed was given, without secrets."""
        config: dict[str, Any] = self._engine.config
        return config

    @property
    def optimized_names(self) -> list[str]:
        """Names of the trained parameters, in the order of the optimizer's groups."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        groups = groups_of_run(self.module, self._options)
        return [names[id(parameter)] for group in groups for parameter in group["params"]]

    @property
    def flat_names(self) -> FlatNames:
        """The flat parameters and the tensors in them."""
        return flat_names(self.module)

    def load_resharded(self, shards: Shards) -> None:
        """Load weights and optimizer state from a checkpoint of another world size or ZeRO stage. Collective.

        Raises:
            UserError: as `shards.fill_engine`.
        """
        fill_engine(self._engine, shards)
        self.apply_options(shards.common.steps - shards.common.skipped)

    def apply_options(self, updates: int) -> None:
        """Use this run's hyperparameters instead of a loaded checkpoint's, after `updates` updates of the optimizer.

        A schedule from the DeepSpeed config keeps its own count.
        """
        optimizer, schedule = self._engine.optimizer, self._engine.lr_scheduler
        groups = optimizer.param_groups
        for group, initial in zip(groups, self._initial_groups, strict=True):
            group.update(initial)
        compat.set_gradient_clipping(optimizer, self._engine.gradient_clipping())
        if isinstance(schedule, LambdaLR):
            rates = compat.restart_schedule(schedule, list(self._initial_rates), updates)
        elif schedule is not None:
            rates = schedule.get_lr()
        else:
            return
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


def choose_attention(model: Any, resolved: ResolvedConfig, device: torch.device, packed: bool = False) -> None:
    """Set the fastest attention unless the options name one: models/attention/row_attention.py on CPUs and for
    packed rows, flash attention in half precision on GPUs where it is installed, else torch's."""
    if device.type == "cpu":
        speed_up_on_cpu(model, keep_attention=resolved.options.attn_implementation is not None)
        return
    flash = is_flash_attn_2_available() and supports_flash_attention(model)
    if resolved.options.attn_implementation is not None:
        return
    if flash and resolved.precision in ("bf16", "fp16"):
        model.set_attn_implementation("flash_attention_2")
    elif packed:
        set_row_attention(model)


def _can_be_flat(resolved: ResolvedConfig) -> bool:
    """Whether parameters may be flat: ZeRO-3 partitions them one by one, and adapters are few; under torch_autocast
    DeepSpeed reduces the gradients of linear layers in half precision, and finds these by their parameters. Optimizers
    that are not elementwise (LAMB, Muon, Adafactor) would work on other tensors."""
    autocast = resolved.precision == "torch_autocast"
    elementwise = works_elementwise(resolved.config.get("optimizer"))
    return resolved.zero_stage < 3 and resolved.options.lora_rank is None and elementwise and not autocast


def training_engine(
    model: Any,
    config: dict[str, Any],
    resolved: ResolvedConfig,
    total_steps: int,
    device: torch.device,
    packed: bool = False,
) -> Engine:
    """`deepspeed.initialize` with the default optimizer and schedule, or those of the config's sections.

    Args:
        packed: whether the rows of a micro-batch come packed.
    """
    deepspeed = import_deepspeed(resolved.options.verbose_logging)
    options: RunOptions = resolved.options
    choose_attention(model, resolved, device, packed)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    flops = training_flops(model, model.config)
    if options.flat_parameters and _can_be_flat(resolved):
        flatten(model, decays)
    if options.torch_compile:
        dist.log0(f"torch_compile: {plural(compile_layers(model), 'layer')}, at the first step")
    optimizer = None if "optimizer" in config else default_optimizer(model, options)
    schedule = None
    if "scheduler" not in config:
        schedule = functools.partial(default_schedule, options=options, total_steps=total_steps)
    with builds_reported(options.timeout):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=groups_of_run(model, options) if optimizer is None else None,
            lr_scheduler=schedule,
            config=config,
        )
    compat.forget_initial_step(engine.optimizer)
    return Engine(engine, resolved, device, flops)


def evaluation_model(
    model: torch.nn.Module, config: dict[str, Any], resolved: ResolvedConfig, device: torch.device
) -> EvalModel:
    """The model for forward passes only: partitioned over the ranks under ZeRO-3, complete on each rank otherwise."""
    choose_attention(model, resolved, device)
    if resolved.zero_stage == 3:
        deepspeed = import_deepspeed(resolved.options.verbose_logging)
        with builds_reported(resolved.options.timeout):
            engine, *_ = deepspeed.initialize(model=model, config=config)
        return Engine(engine, resolved, device)
    return EvalModel(model.to(device=device, dtype=weight_dtype(resolved.precision)), resolved, device)
