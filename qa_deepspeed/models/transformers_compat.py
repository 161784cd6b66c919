"""Private names of Transformers and peft, each behind a function with a plain name; nothing else here uses them.

`check_supported` looks for all of them at start. Imports of Transformers stand inside the functions: its modelling code
takes seconds to import, which commands that load no model need not wait for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from qa_deepspeed.utils.supported import require_names, unsupported

TRANSFORMERS_NAMES = {
    "transformers.modeling_utils:PreTrainedModel": (
        "_load_pretrained_model",
        "_from_config",
        "_supports_attention_backend",
        "_supports_flash_attn",
    ),
    "transformers.modeling_utils": ("PreTrainedModel",),
    "transformers.core_model_loading": ("WeightConverter", "rename_source_key", "_weight_conversions"),
    "transformers.core_model_loading:WeightRenaming": ("was_used",),
    "transformers.utils.loading_report": ("LoadStateDictInfo",),
    "transformers.initialization": ("_is_hf_initialized",),
    "transformers.configuration_utils:PreTrainedConfig": ("_attn_implementation",),
    "transformers.masking_utils": ("bidirectional_mask_function", "sdpa_mask"),
    "transformers.integrations.sdpa_attention": ("sdpa_attention_forward",),
    "transformers.modeling_layers": ("GradientCheckpointingLayer",),
}
PEFT_NAMES = {
    "peft.tuners.tuners_utils": ("BaseTunerLayer",),
    "peft:LoraModel": ("targeted_module_names",),
}
"""Module or "module:class" -> names in it."""

READER = "_load_pretrained_model"
"""The method of `PreTrainedModel` by which `from_pretrained` reads weights into a model that has been made."""

READER_ARGUMENTS = ["model", "state_dict", "checkpoint_files", "load_config"]
"""Its first arguments."""


@functools.cache
def check_supported() -> None:
    """Check once in a process that all private names of Transformers are there.

    Raises:
        UserError: one is missing, or takes other arguments.
    """
    require_names("transformers", TRANSFORMERS_NAMES)
    from transformers import PreTrainedModel

    arguments = list(inspect.signature(getattr(PreTrainedModel, READER)).parameters)
    if arguments[: len(READER_ARGUMENTS)] != READER_ARGUMENTS:
        raise unsupported("transformers", f"has another signature for reading weights ({', '.join(arguments)})")


@functools.cache
def check_peft_supported() -> None:
    """The same for peft, which is installed."""
    require_names("peft", PEFT_NAMES)


# Loading and saving weights


@contextlib.contextmanager
def reading_weights_by(
    read: Callable[[Any, list[str], list[Any]], Any], report_unread: Callable[[str], None]
) -> Iterator[None]:
    """Inside, `from_pretrained` fills a model by `read(model, files, renamings)`, which returns a `LoadReport`.

    `files` are safetensors files. Where the weights cannot be read so, `report_unread` is called with the reason, and
    Transformers reads them.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

    check_supported()
    original = inspect.getattr_static(PreTrainedModel, READER)
    theirs: Callable[..., Any] = getattr(PreTrainedModel, READER)

    def obstacle(state_dict: Any, files: Any, load_config: Any) -> str | None:
        if state_dict is not None or not files or not all(str(name).endswith(".safetensors") for name in files):
            return "its weights are no safetensors files"
        if load_config.is_quantized:
            return "its weights are quantized"
        if any(isinstance(entry, WeightConverter) for entry in load_config.weight_mapping or ()):
            return "its weights are converted while they are read"
        return None

    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *rest: Any, **named: Any) -> Any:
        reason = obstacle(state_dict, checkpoint_files, load_config)
        if reason is not None:
            report_unread(reason)
            return theirs(model, state_dict, checkpoint_files, load_config, *rest, **named)
        return read(model, checkpoint_files, load_config.weight_mapping or []), None

    setattr(PreTrainedModel, READER, staticmethod(load))
    try:
        yield
    finally:
        setattr(PreTrainedModel, READER, original)


def load_report(missing: Iterable[str]) -> Any:
    """What `from_pretrained` expects of its reader: sets `missing_keys` (here all of the model's), `unexpected_keys`
    and `mismatched_keys`, which the reader then corrects."""
    from transformers.utils.loading_report import LoadStateDictInfo

    empty: dict[str, Any] = {field.name: set() for field in dataclasses.fields(LoadStateDictInfo)}
    return LoadStateDictInfo(**empty | {"missing_keys": set(missing), "error_msgs": [], "conversion_errors": {}})


def name_in_model(stored: str, renamings: list[Any], model: Any, names: dict[str, Any]) -> str:
    """The model's name for the tensor that a checkpoint calls `stored`; `names` are the model's own."""
    from transformers.core_model_loading import rename_source_key

    return str(rename_source_key(stored, renamings, [], model.base_model_prefix, names)[0])


def mark_as_loaded(parameter: Any) -> None:
    """Keep Transformers from drawing this parameter at random."""
    parameter._is_hf_initialized = True


def set_renamings(model: Any, renamings: list[Any]) -> None:
    """Note the renamings of weights that loading used; saving applies them backwards."""
    model._weight_conversions = renamings


def keep_used_renamings(model: Any) -> None:
    """Forget the renamings that matched no weight, else saving applies them backwards.

    Loading into partitioned parameters keeps all known ones, so that TensorFlow's names (LayerNorm.gamma), which the
    checkpoint did not have, would be saved.
    """
    renamings = getattr(model, "_weight_conversions", None)
    if renamings:
        model._weight_conversions = [renaming for renaming in renamings if renaming.was_used()]


def model_of_class(kind: Any, config: Any, dtype: torch.dtype, **more: Any) -> Any:
    """A model of a Transformers class, auto class or not, with weights drawn at random; `more` goes to Transformers."""
    make = getattr(kind, "from_config", None) or kind._from_config
    return make(config, dtype=dtype, **more)


# Attention and layers


def attention_implementation(model: Any) -> str:
    """Name of the attention that the model works with."""
    return str(model.config._attn_implementation)


def uses_torch_attention(model: Any) -> bool:
    """Whether the model works by Transformers' attention interface, with torch's attention chosen."""
    return getattr(model, "_supports_attention_backend", False) and attention_implementation(model) == "sdpa"


def supports_flash_attention(model: Any) -> bool:
    """Whether the model can work with flash attention."""
    return bool(getattr(model, "_supports_flash_attn", False))


def torch_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    """Transformers' attention function around torch's scaled_dot_product_attention."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, mask, **rest)


def torch_attention_mask(**arguments: Any) -> Tensor | None:
    """The mask `[rows, 1, length, length]` that goes with `torch_attention`."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(**arguments)


def masks_padding_only(mask_function: Any) -> bool:
    """Whether a mask function of Transformers lets all tokens attend to all that are not padding."""
    from transformers.masking_utils import bidirectional_mask_function

    return mask_function is bidirectional_mask_function


def repeated_layers(model: Any) -> list[Any]:
    """The layers that gradient checkpointing computes again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


# peft

ADAPTER = "default"
"""Name that peft gives a model's only adapter; files leave it out."""

NAME_PREFIX = "base_model.model."
"""Begins the names in peft's files: its wrapper holds the model there."""


def adapter_layers(model: Any) -> list[Any]:
    """The modules of a model that peft put adapters into."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapted_names(tuner: Any) -> list[str]:
    """Names of the modules that a peft tuner put adapters into."""
    return sorted(tuner.targeted_module_names)


def name_in_adapter_file(name: str) -> str:
    """A parameter's name in peft's files."""
    return NAME_PREFIX + name.replace(f".{ADAPTER}.", ".").replace(".base_layer.", ".")
