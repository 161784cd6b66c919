"""Forward, loss and backward of a micro-batch as one CUDA graph per shape, handed to autograd as one function.

Small models and small batches leave a GPU waiting for the host, which starts thousands of kernels in a step
(tests/bench/history/h100_baseline.md). A graph starts them at once. It computes the gradients of all trained parameters
by `torch.autograd.grad`, so that no hook of DeepSpeed runs inside; the backward pass of the loss then gives each
parameter its gradient, and DeepSpeed's hooks see an ordinary backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from qa_deepspeed.config.option_groups import AUTO
from qa_deepspeed.engine.ds_config import ResolvedConfig
from qa_deepspeed.models.torch_compat import copy_all
from qa_deepspeed.qa.features.batching import Batch, Packing
from qa_deepspeed.utils.errors import UserError

TOKEN_MULTIPLE = 256
"""Packed micro-batches are filled up to a multiple of this many tokens where they run as graphs: an epoch of random
steps of 16 rows has about 8 shapes then, and 4 % of its tokens are filler (en-v1-train.json, length 384)."""

MOST_SHAPES = 32
"""Shapes with a graph of their own; micro-batches of further shapes run without one."""

WARM_UP_RUNS = 2
"""Runs before a capture, in which libraries allocate their workspaces and choose kernels."""

TOLERANCE = 1e-2
"""Largest relative difference of the first graph's loss and gradient norm from those of a run without a graph: kernels
that add in any order differ by less, even in bfloat16."""

Work = Callable[[], None]
"""Writes its results to fixed tensors."""

Forward = Callable[[dict[str, Any]], Any]
"""A model's forward pass, from its arguments to its outputs."""


def uses_graphs(resolved: ResolvedConfig, device_type: str, packed: bool, ranks: int) -> bool:
    """Whether micro-batches of a run run as CUDA graphs. By `auto` on one GPU: on several, a graph would keep the
    gradients' reduction from overlapping with the backward pass."""
    wanted = resolved.options.cuda_graphs
    possible = _obstacle(resolved, device_type, packed) is None
    return possible and (wanted == "true" or (wanted == AUTO and ranks == 1))


def require_graphs(resolved: ResolvedConfig, device_type: str, packed: bool) -> None:
    """Check that a run that asks for CUDA graphs can have them.

    Raises:
        UserError: it cannot.
    """
    obstacle = _obstacle(resolved, device_type, packed)
    if resolved.options.cuda_graphs == "true" and obstacle is not None:
        raise UserError(f"--cuda_graphs true: {obstacle}; leave it out")


def _obstacle(resolved: ResolvedConfig, device_type: str, packed: bool) -> str | None:
    """Why a run cannot have CUDA graphs; None if it can."""
    if device_type != "cuda":
        return "there is no GPU"
    if not packed:
        return "the rows are padded (--batch_layout)"
    if resolved.zero_stage == 3:
        return "ZeRO-3 gathers parameters in every layer"
    if resolved.precision not in ("fp32", "bf16"):
        return f"the precision is {resolved.precision}"
    return "--gradient_checkpointing reads the random state" if resolved.options.gradient_checkpointing else None


def fixed_shapes(packing: Packing, longest: int) -> Packing:
    """The packing for graphs: shapes depend on the number of tokens, rounded up, not on the rows.

    Args:
        longest: tokens of the longest row of the run.
    """
    return Packing(packing.first_position, TOKEN_MULTIPLE, row_length=longest)


def use_own_stream() -> None:
    """Make this thread work on a new stream: the default stream cannot be captured."""
    torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]


class _Known(torch.autograd.Function):
    """A loss as a function of parameters whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the loss is not read: the graph has multiplied its factor in.

        Nothing keeps a reference to the gradients, so that autograd makes them `grad` of the parameters without a copy.
        """
        gradients, ctx.gradients = ctx.gradients, None
        return (None, None, *gradients)


@dataclass
class _Graph:
    """A captured shape: where its inputs lie, and what runs it."""

    batch: Batch
    replay: Work


def capture_on_gpu(pool: list[Any]) -> Callable[[Work], Work]:
    """Captures work as a CUDA graph; all graphs share the memory of `pool`, which the first one fills."""

    def capture(work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # other threads (the one that sends batches, NCCL's watchdog) may call CUDA meanwhile
        settings: dict[str, Any] = {"pool": pool[0] if pool else None, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), **settings):
            work()
        pool[:] = [graph.pool()]
        return graph.replay

    return capture


class StepGraphs:
    """The losses of micro-batches by graphs; without one where a capture fails."""

    def __init__(
        self,
        module: torch.nn.Module,
        loss_of: Callable[[Forward, Batch], Tensor],
        factor: float,
        keep_gradients: bool,
        log: Callable[[str], None],
        capture: Callable[[Work], Work] | None = None,
    ) -> None:
        """
        Args:
            module: the model. loss_of: the sum of a micro-batch's losses, by a forward pass.
            factor: what the gradients are multiplied by: the derivative that the loss will get in the backward pass.
            keep_gradients: whether a parameter's gradient must outlast the next micro-batch, as in accumulation.
            capture: turns work into what repeats it, by default `capture_on_gpu`.
        """
        self._module, self._loss_of, self._factor, self._log = module, loss_of, factor, log
        self._keep_gradients = keep_gradients
        self._capture = capture or capture_on_gpu([])
        self._parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
        self._gradients: list[Tensor | None] | None = None
        device = next(iter(self._parameters.values())).device
        self._loss = torch.zeros((), device=device)
        self._rows = torch.ones((), device=device)
        self._graphs: dict[tuple[torch.Size, ...], _Graph | None] = {}
        self._working = True
        self.seconds = 0.0

    @property
    def count(self) -> int:
        """Shapes that have a graph."""
        return sum(graph is not None for graph in self._graphs.values())

    def loss(self, batch: Batch, rows: int) -> Tensor:
        """The micro-batch's part of the mean loss over the `rows` of a step, a scalar with a derivative.

        The random state is that of a run without a graph: dropout masks depend on the seed set before the call.
        """
        graph = self._graph_of(batch)
        if graph is None:
            return self._loss_of(lambda inputs: self._module(**inputs), batch) / rows
        self._rows.fill_(rows)
        copy_all(graph.batch.tensors(), batch.tensors())
        graph.replay()
        assert self._gradients is not None
        known = [
            None if one is None else one.clone() if self._keep_gradients else one.detach() for one in self._gradients
        ]
        loss: Tensor = _Known.apply(self._loss, known, *self._parameters.values())  # type: ignore[no-untyped-call]
        return loss

    def _graph_of(self, batch: Batch) -> _Graph | None:
        shapes = tuple(one.shape for one in batch.tensors())
        if not self._working or (shapes not in self._graphs and len(self._graphs) >= MOST_SHAPES):
            return None
        if shapes not in self._graphs:
            self._graphs[shapes] = self._captured(batch)
        return self._graphs[shapes]

    def _captured(self, batch: Batch) -> _Graph | None:
        """A graph for the shape of `batch`; None where the capture fails, which is logged."""
        began, seed = time.perf_counter(), torch.initial_seed()
        own = batch.with_tensors([one.clone() for one in batch.tensors()])
        try:
            for _ in range(WARM_UP_RUNS):
                torch.manual_seed(seed)
                self._work(own)
            graph = _Graph(own, self._capture(lambda: self._work(own)))
            problem = None if self._graphs else self._difference(graph, seed)
        except RuntimeError as error:  # torch's errors of CUDA are of this class
            problem = str(error).splitlines()[0]
        finally:
            torch.manual_seed(seed)
            self.seconds += time.perf_counter() - began
        if problem is None:
            return graph
        self._working = bool(self.count)
        self._log(f"CUDA graphs: {'none for this shape' if self._working else 'not used'}: {problem}")
        return None

    def _difference(self, graph: _Graph, seed: int) -> str | None:
        """Why results of the graph are not those of the work without a graph; None if they are. Waits for the GPU."""
        found = []
        ways: tuple[Work, Work] = (lambda: self._work(graph.batch), graph.replay)
        for way in ways:
            torch.manual_seed(seed)
            way()
            gradients = [one for one in self._gradients or [] if one is not None]
            found.append((float(self._loss), float(torch.nn.utils.get_total_norm(gradients))))
        for name, expected, value in zip(("loss", "gradient norm"), *found, strict=True):
            if not abs(value - expected) <= TOLERANCE * abs(expected):
                return f"the {name} is {value:.6g} by a graph and {expected:.6g} without one"
        return None

    def _work(self, batch: Batch) -> None:
        """Forward, loss and gradients, written to this object's tensors.

        The trained parameters are replaced by new leaves on the same memory: autograd's node of a parameter belongs to
        the stream on which it was made, and carries DeepSpeed's hooks, and a capture must meet neither.
        """
        aliases: dict[str, Tensor] = {name: torch.nn.Parameter(one.detach()) for name, one in self._parameters.items()}

        def forward(inputs: dict[str, Any]) -> Any:
            return functional_call(self._module, aliases, (), inputs)

        loss = self._loss_of(forward, batch) / self._rows
        gradients = torch.autograd.grad(loss * self._factor, list(aliases.values()), allow_unused=True)
        self._loss.copy_(loss.detach())
        if self._gradients is None:
            self._gradients = [None if one is None else torch.empty_like(one) for one in gradients]
        pairs = [(own, one) for own, one in zip(self._gradients, gradients, strict=True) if own is not None]
        copy_all([own for own, _ in pairs], [one for _, one in pairs])
