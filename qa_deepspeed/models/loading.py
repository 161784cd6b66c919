"""Load config, tokenizer and model with a question-answering head from a folder or the hub."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer, PretrainedConfig

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.heads import BEAM_CLASSES
from qa_deepspeed.models.lora import base_of, load_adapters
from qa_deepspeed.models.transformers_compat import check_supported, keep_used_renamings, model_of_class
from qa_deepspeed.utils.errors import UserError

LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    ImportError,
    StrictDataclassError,
    SafetensorError,
    RuntimeError,
    EOFError,
    UnpicklingError,
)
"""Errors of Transformers: ImportError for a package that a model needs, the next for values of a config, the last four
for weights that are truncated or have other shapes."""


WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""Files that hold weights."""

ONNX_FILE = "model.onnx"
"""File of a model that `export --format onnx` made; inference/onnx_model.py runs it."""

CONFIGS = ("config.json", "adapter_config.json")
"""Files that say what the weights are used for."""


def quiet_transformers(verbose: bool) -> None:
    """Silence Transformers' load reports and progress bars unless `verbose`."""
    if not verbose:
        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load_config(options: RunOptions) -> PretrainedConfig:
    """The model's config; of a student with fewer layers the student's.

    Raises:
        UserError: no model named, none found, `model_type` contradicts it, or it has not the `student_layers`.
    """
    if not options.model_name_or_path:
        raise UserError("--model_name_or_path is required: a folder of a model or a name on the hub")
    name = options.config_name or _name_with(options, "config.json")
    if Path(str(name)).is_dir() and not (Path(str(name)) / "config.json").exists():
        raise UserError(f"{name} holds no model: there is no config.json in this folder")
    config: PretrainedConfig = _from_pretrained(AutoConfig, name, options)
    layers = chosen_layers(options)
    if layers is not None:
        choose_layers(config, layers, str(options.model_name_or_path))
    if options.model_type and options.model_type.lower() != config.model_type:
        raise UserError(
            f"model_type {options.model_type} contradicts {options.model_name_or_path}, which is a "
            f"{config.model_type}; leave --model_type out"
        )
    return config


def chosen_layers(options: RunOptions) -> tuple[int, ...] | None:
    """The layers of `model_name_or_path` that the student has, counted from 0; None for all.

    Raises:
        UserError: the option is no list of rising numbers, or its adapters would be saved beside the full model.
    """
    if options.student_layers is None:
        return None
    parts = [part.strip() for part in options.student_layers.split(",")]
    layers = tuple(int(part) for part in parts if part.isdecimal())
    if len(layers) != len(parts) or list(layers) != sorted(set(layers)):
        raise UserError(f"student_layers {options.student_layers}: write rising numbers, counted from 0, like 0,2,4")
    if options.lora_rank is not None:
        raise UserError(
            "student_layers with lora_rank: an adapter names the full model as its base; leave one of them out"
        )
    return layers


def choose_layers(config: Any, layers: Sequence[int], name: str) -> None:
    """Change a model's config to one with these layers only.

    Raises:
        UserError: the model `name` has not all of them.
    """
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or getattr(config, "is_encoder_decoder", False):
        raise UserError(f"student_layers: {name}, a {config.model_type}, has no single stack of layers to choose from")
    if layers[-1] >= count:
        raise UserError(f"student_layers names layer {layers[-1]}, but {name} has {count}, counted from 0")
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(layers)
    if kinds:
        config.layer_types = [kinds[layer] for layer in layers]


def load_tokenizer(options: RunOptions) -> Any:
    """The model's tokenizer; `do_lower_case` overrides what was saved with it.

    Raises:
        UserError: none found, or one without a vocabulary, which Transformers makes where a folder has no such files.
    """
    extra = {"do_lower_case": True} if options.do_lower_case else {}
    name = options.tokenizer_name or _name_with(options, "tokenizer_config.json")
    tokenizer = _from_pretrained(AutoTokenizer, name, options, **extra)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(f"'{name}' has no tokenizer files: copy them there, or pass --tokenizer_name")
    return tokenizer


def check_vocabulary(name: str | None, config: PretrainedConfig, tokenizer: Any) -> None:
    """Raises UserError if text can get ids that the model's embedding has not.

    Added tokens, which text does not give, do not count: some models have no row for them.
    """
    size = getattr(config, "vocab_size", None)
    added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    ids = [number for token, number in tokenizer.get_vocab().items() if token not in added]
    ids += [number for number in (tokenizer.pad_token_id, tokenizer.unk_token_id) if number is not None]
    if isinstance(size, int) and max(ids, default=0) >= size:
        raise UserError(
            f"the tokenizer has ids up to {max(ids)}, but the embedding of {name} has {size} rows: it is the tokenizer "
            "of another model, see --tokenizer_name"
        )


def _name_with(options: RunOptions, file: str) -> str | None:
    """The model's folder or hub name; for an adapter without `file` that of its base model."""
    name = options.model_name_or_path
    base = base_of(name)
    return name if base is None or (Path(str(name)) / file).is_file() else base


def set_value(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Set a parameter to `value`."""
    with torch.no_grad():
        parameter.copy_(value)


def load_model(
    options: RunOptions, config: PretrainedConfig, fill: Callable[[torch.Tensor, torch.Tensor], None] = set_value
) -> tuple[torch.nn.Module, list[str]]:
    """The model in float32, and the names of weights that are missing in the checkpoint and drawn at random.

    If `model_name_or_path` is a folder with a LoRA adapter: its base model with the adapter and its head.

    Args:
        fill: sets a parameter to its full value, for partitioned models.
    Raises:
        UserError: no weights are found, or the architecture has no question-answering head.
    """
    check_supported()
    name = options.model_name_or_path
    if (Path(str(name)) / ONNX_FILE).is_file() and not holds_weights(str(name)):
        raise UserError(
            f"{name} is an ONNX export, which predict, evaluate and QuestionAnswerer run: name the model it was made of"
        )
    base = base_of(name)
    model, report = _from_pretrained(
        _model_class(config, options.qa_head),
        base or name,
        options,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        attn_implementation=options.attn_implementation,
    )
    keep_used_renamings(model)
    fresh = set(report["missing_keys"])
    if base is not None:
        fresh -= set(load_adapters(model, str(name), fill))
    return model, sorted(fresh)


def missing_in_backbone(model: torch.nn.Module, fresh: list[str]) -> list[str]:
    """Of the weights that were missing in a checkpoint, those of the pretrained model itself, not of a head on it.

    A whole checkpoint has them all: one that lacks some is incomplete, or of another architecture.
    """
    backbone = f"{getattr(model, 'base_model_prefix', '')}."
    return [name for name in fresh if name.startswith(backbone)]


def require_trained_weights(name: str | None, model: torch.nn.Module, fresh: list[str]) -> None:
    """Raises UserError if weights (`fresh`) were missing in the checkpoint `name`: its answers would be random."""
    if missing_in_backbone(model, fresh):
        raise UserError(f"{name} is incomplete, or of another architecture: {', '.join(fresh)} missing")
    if fresh:
        raise UserError(f"{name} has no trained question-answering head: train it first ({', '.join(fresh)} missing)")


def model_from_config(
    config: PretrainedConfig, qa_head: str | None = None, attn_implementation: str | None = None
) -> torch.nn.Module:
    """The model with random weights, to be filled from a checkpoint.

    Raises:
        UserError: as `load_model`.
    """
    check_supported()
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model: torch.nn.Module = model_of_class(_model_class(config, qa_head), config, torch.float32, **attention)
    return model


def head_kind(config: PretrainedConfig, qa_head: str | None) -> str:
    """The kind of head of `load_model`'s model: span or beam.

    Raises:
        UserError: as `load_model`.
    """
    return "span" if _model_class(config, qa_head) is AutoModelForQuestionAnswering else "beam"


def _model_class(config: PretrainedConfig, qa_head: str | None) -> Any:
    """The Transformers class for `qa_head` (span or beam), or by default for the checkpoint's head.

    AutoModelForQuestionAnswering selects the span head of XLNet and XLM.
    """
    beam = BEAM_CLASSES.get(config.model_type)
    if qa_head == "span" or (qa_head is None and beam not in (config.architectures or ())):
        return AutoModelForQuestionAnswering
    if beam is None:
        raise UserError(
            f"a {config.model_type} has no beam head, only {' and '.join(BEAM_CLASSES)} have: leave --qa_head out"
        )
    return getattr(transformers, beam)


def check_attention(options: RunOptions, config: PretrainedConfig) -> None:
    """Raises UserError if the model cannot work with `attn_implementation`; no weights are loaded.

    Transformers checks the name when it makes a model, which is after features are built.
    """
    if options.attn_implementation is None:
        return
    try:
        with torch.device("meta"):
            kind = _model_class(config, options.qa_head)
            model_of_class(kind, copy.deepcopy(config), torch.float32, attn_implementation=options.attn_implementation)
    except LOADING_ERRORS as error:
        raise UserError(
            f"attn_implementation {options.attn_implementation} cannot be used: {_reason(error)}; leave it out for the "
            "fastest one available"
        ) from None


def holds_weights(folder: str) -> bool:
    """Whether there are weights in a folder."""
    return any(next(Path(folder).glob(pattern), None) for pattern in WEIGHTS)


def require_weights(options: RunOptions) -> None:
    """Raises UserError if `model_name_or_path` is a folder without weights."""
    name = str(base_of(options.model_name_or_path) or options.model_name_or_path)
    if Path(name).is_dir() and not holds_weights(name):
        raise UserError(f"{name}: holds no weights ({' or '.join(WEIGHTS)}): pass the folder of a saved model")


def model_files(options: RunOptions) -> tuple[list[Path], str | None]:
    """What the outputs of a model depend on: files of its folder, or its name and commit if it comes from the hub; of
    an adapter also those of its base model. Its config has been loaded.
    """
    name = str(options.model_name_or_path)
    base = base_of(name)
    files: list[Path] = []
    for folder in (name, base):
        if folder is not None and Path(folder).is_dir():
            files += [path for pattern in (*WEIGHTS, *CONFIGS) for path in sorted(Path(folder).glob(pattern))]
    of_hub = base or name
    if Path(of_hub).is_dir():
        return files, None
    config = try_to_load_from_cache(of_hub, "config.json", cache_dir=_hub_cache(options))
    return files, f"{of_hub} {Path(config).parent.name if isinstance(config, str) else ''}"


def _reason(error: BaseException) -> str:
    """What an error of Transformers says, in its first line or two."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0]).removesuffix(".")


def _hub_cache(options: RunOptions) -> str | None:
    """Where files of the hub are kept; None for its client's own folder."""
    return str(Path(options.cache_dir) / "hub") if options.cache_dir else None


def _from_pretrained(auto_class: Any, name: str | None, options: RunOptions, **extra: Any) -> Any:
    is_path = str(name).startswith(("/", "./", "../", "~")) or str(name).count("/") > 1  # the hub has no such names
    if is_path and not Path(str(name)).exists():
        raise UserError(f"{name}: no such folder; check the path of the model")
    try:
        # without a value Transformers asks on the terminal whether to run the Python code that a model brings
        return auto_class.from_pretrained(name, cache_dir=_hub_cache(options), trust_remote_code=False, **extra)
    except LOADING_ERRORS as error:
        what = "config" if auto_class is AutoConfig else "tokenizer" if auto_class is AutoTokenizer else "weights"
        if "trust_remote_code" in str(error):
            raise UserError(
                f"the {what} of '{name}' needs Python code that comes with the model, which is never run: use a model "
                "of an architecture that Transformers has"
            ) from None
        hint = "" if what == "weights" else "; is that the folder of a model, or its name on the hub?"
        raise UserError(f"cannot load the {what} of '{name}': {_reason(error)}{hint}") from None
