"""Memory footprint of a model: parameters, and activations that the forward pass saves, counted on the meta device.

Nothing is loaded and nothing computed: tensors on that device have shapes only.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering, PretrainedConfig

from qa_deepspeed.models.layers import freeze
from qa_deepspeed.models.lora import LoraSettings, adapted_modules, add_adapters
from qa_deepspeed.models.transformers_compat import model_of_class, repeated_layers
from qa_deepspeed.utils.errors import UserError


@dataclass(frozen=True)
class Footprint:
    """Numbers of parameters, and bytes of activations of one micro-batch.

    trained: those that are trained. largest_layer: parameters of the largest repeated layer (of the model if none
    repeats). largest_tensor, largest_trained: elements of the largest parameter, and of the largest trained one.
    saved: bytes of the tensors that autograd keeps, of which `attention` are matrices of attention weights; queries,
    keys and values count in the model's dtype. checkpointed and checkpointed_attention: the same if only the input of
    each repeated layer is kept and one layer at a time is recomputed. adapted: bytes of the outputs of modules with
    adapters. counted: whether activations were counted, else they are from a formula.
    """

    parameters: int
    trained: int
    largest_layer: int
    largest_tensor: int
    largest_trained: int
    saved: int
    attention: int
    checkpointed: int
    checkpointed_attention: int
    adapted: int
    counted: bool


def footprint(
    config: PretrainedConfig,
    rows: int,
    length: int,
    dtype: torch.dtype,
    lora: LoraSettings | None = None,
    frozen: str | None = None,
) -> Footprint:
    """The footprint of a model of this config in training on `rows` rows of `length` tokens in `dtype`; all of it is
    trained but what is `frozen` (the option `freeze`), or only adapters as in `lora` and the head.

    Raises:
        UserError: it has no question-answering head, none of the modules named for adapters, or no layer to freeze.
    """
    with torch.device("meta"):
        try:
            model = model_of_class(AutoModelForQuestionAnswering, copy.deepcopy(config), dtype).train()
        except ValueError as error:
            raise UserError(f"no question-answering model of type {config.model_type}: {error}") from None
        if lora is not None:
            add_adapters(model, lora, base="", seed=0)
        freeze(model, frozen)
    layers = repeated_layers(model)
    parameters = [parameter.numel() for parameter in model.parameters()]
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    largest_layer = max((sum(each.numel() for each in layer.parameters()) for layer in layers), default=sum(parameters))
    try:
        counter = _SavedTensors(model, layers, rows, length)
        counter.run(torch.zeros(rows, length, dtype=torch.long, device="meta"))
        saved = counter.totals()
    except (
        RuntimeError,
        NotImplementedError,
        AttributeError,
    ):  # the pass needs values
        counter = None
        saved = _by_formula(config, rows, length, torch.finfo(dtype).bits // 8)
    return Footprint(
        sum(parameters),
        sum(trained),
        largest_layer,
        max(parameters),
        max(trained),
        *saved,
        adapted=counter.adapted if counter else 0,
        counted=counter is not None,
    )


def describe_parameters(model: Footprint) -> str:
    """The number of parameters as text, and of trained ones if not all are."""
    some = f", {model.trained:,} of them trained" if model.trained != model.parameters else ""
    return f"{model.parameters:,} parameters{some}"


def _by_formula(config: PretrainedConfig, rows: int, length: int, element: int) -> tuple[int, int, int, int]:
    """saved, attention, checkpointed and checkpointed_attention by Korthikanti et al. 2022, equation 2: a layer keeps
    sbh(34 + 5as/h) bytes in half precision, of b rows of length s, a heads and width h."""
    width = length * rows * config.hidden_size
    scores = rows * config.num_attention_heads * length**2
    rest, attention, kept_input = 17 * width * element, 5 * scores * element // 2, width * element
    layers = config.num_hidden_layers + (getattr(config, "decoder_layers", None) or 0)
    return (rest + attention) * layers, attention * layers, kept_input * layers + rest + attention, attention


class _SavedTensors:
    """Bytes that the forward pass of a model saves, by repeated layer (None: outside of all)."""

    def __init__(self, model: torch.nn.Module, layers: list[Any], rows: int, length: int):
        self.bytes_of: dict[int | None, int] = defaultdict(int)
        self.attention_of: dict[int | None, int] = defaultdict(int)
        self.layer_input = 0
        self.adapted = 0
        self._model = model
        self._rows, self._length = rows, length
        self._half = next(model.parameters()).dtype != torch.float32
        self._layer: int | None = None
        self._calls = 0
        # By identity: a storage's Python object is the same for all tensors that view it, while it is kept here.
        self._seen = {id(storage): storage for storage in (each.untyped_storage() for each in model.parameters())}
        for layer in layers:
            layer.register_forward_pre_hook(self._enter, with_kwargs=True)
            layer.register_forward_hook(self._leave)
        for module in adapted_modules(model):
            module.register_forward_hook(self._adapt)

    def run(self, input_ids: torch.Tensor) -> None:
        """One forward pass."""
        with torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor):
            self._model(input_ids=input_ids)

    def totals(self) -> tuple[int, int, int, int]:
        """saved, attention, checkpointed and checkpointed_attention of the pass."""
        outside, outside_attention = self.bytes_of.pop(None, 0), self.attention_of.pop(None, 0)
        inputs = len(self.bytes_of) * self.layer_input
        return (
            outside + sum(self.bytes_of.values()),
            outside_attention + sum(self.attention_of.values()),
            outside + inputs + max(self.bytes_of.values(), default=0),
            outside_attention + max(self.attention_of.values(), default=0),
        )

    def _enter(self, module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        # A layer that is used several times (ALBERT's) keeps its activations each time.
        self._layer, self._calls = self._calls, self._calls + 1
        given = next(value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor))
        self.layer_input = max(self.layer_input, given.numel() * given.element_size())

    def _leave(self, *_: Any) -> None:
        self._layer = None

    def _adapt(self, module: Any, given: Any, output: torch.Tensor) -> None:
        self.adapted += output.nbytes

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self._seen:
            self._seen[id(storage)] = storage
            size = storage.nbytes()
            if tensor.dim() > 2 and tensor.shape[-2:] == (self._length, self._length):
                self.attention_of[self._layer] += size
            elif self._half and self._of_heads(tensor):
                size //= 2  # torch's math attention, the only one on this device, saves a float32 copy
            self.bytes_of[self._layer] += size
        return tensor

    def _of_heads(self, tensor: torch.Tensor) -> bool:
        """Whether these are queries, keys or values in float32, `[rows * heads, length, head width]` or transposed."""
        shape = tensor.shape
        of_rows = tensor.dim() == 3 and shape[0] > self._rows and shape[0] % self._rows == 0
        return of_rows and tensor.dtype == torch.float32 and self._length in shape[1:]
