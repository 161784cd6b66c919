"""What differs by architecture when a question and a context become the input of a model.

One table names the known families; a model that is not in it works by what its tokenizer and config say.
Sources: the forward signatures and tokenizer classes of Transformers 5, and the inputs that the classic run_squad.py
sent to each model type.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from qa_deepspeed.utils.errors import UserError

NullRule = Literal["cls", "last"]


@dataclass(frozen=True)
class Family:
    """How rows of one architecture are laid out.

    context_first: the context stands before the question. null_rule: the position that means "no answer" is that of
    the CLS token, or the last real token. causal: tokens see only what stands before them. pad_token_id, pad_type_id:
    what pads a row (tokenizers of decoders often name no pad token; the end-of-text token does its work, masked).
    language_ids: the model takes one language id per token (`langs`).
    """

    name: str
    context_first: bool
    null_rule: NullRule
    padding_side: Literal["left", "right"]
    sends_token_type_ids: bool
    causal: bool
    pad_token_id: int
    pad_type_id: int
    language_ids: bool = False


@dataclass(frozen=True)
class _Facts:
    """A row of the table. None: what tokenizer and config say decides."""

    token_type_ids: bool | None = None
    causal: bool = False
    language_ids: bool = False


_ENCODER = _Facts()
_NO_TYPES = _Facts(token_type_ids=False)
_DECODER = _Facts(token_type_ids=False, causal=True)

# XLNet and Funnel compare type ids with each other and so have no type_vocab_size; XLM would look them up as words.
FAMILIES: dict[str, _Facts] = {
    **dict.fromkeys(["bert", "albert", "electra", "big_bird", "mobilebert", "rembert"], _ENCODER),
    **dict.fromkeys(["roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "longformer"], _ENCODER),
    **dict.fromkeys(["deberta", "deberta-v2", "convbert", "ernie", "nystromformer", "squeezebert", "yoso"], _ENCODER),
    **dict.fromkeys(["distilbert", "mpnet", "modernbert", "flaubert", "bart", "mbart", "t5", "mt5", "umt5"], _NO_TYPES),
    **dict.fromkeys(["xlnet", "funnel"], _Facts(token_type_ids=True)),
    "xlm": _Facts(token_type_ids=False, language_ids=True),
    **dict.fromkeys(["gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "llama", "mistral"], _DECODER),
    **dict.fromkeys(["mixtral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "nemotron"], _DECODER),
    **dict.fromkeys(["exaone4", "smollm3", "arcee", "minimax", "stablelm", "phi", "phi3", "gemma", "gemma2"], _DECODER),
}


def family_of(model_config: Any, tokenizer: Any) -> Family:
    """The layout of rows for this model.

    Args: model_config: a transformers PretrainedConfig (its model_type, type_vocab_size, ... are read);
        tokenizer: the tokenizer that goes with it.
    Raises: UserError if neither the table nor tokenizer and config tell how this model reads a pair of texts.
    """
    name = str(getattr(model_config, "model_type", "") or "")
    facts = FAMILIES.get(name)
    if facts is None:
        facts = _facts_of_unknown(name, model_config, tokenizer)
    left = tokenizer.padding_side == "left"
    cls = getattr(tokenizer, "cls_token_id", None)
    return Family(
        name=name,
        # A causal context token must have seen the question; other models that pad on the left were trained with
        # the context first (XLNet).
        context_first=left and not facts.causal,
        null_rule="last" if facts.causal or cls is None else "cls",
        padding_side="left" if left else "right",
        sends_token_type_ids=_sends_types(facts, model_config, "token_type_ids" in tokenizer.model_input_names),
        causal=facts.causal,
        pad_token_id=_pad_token_id(tokenizer),
        pad_type_id=int(getattr(tokenizer, "pad_token_type_id", 0) or 0),
        language_ids=facts.language_ids and getattr(model_config, "n_langs", 1) > 1,
    )


def model_columns(model_or_forward: Any, model_config: Any) -> frozenset[str]:
    """The names of the input columns that this model's `forward` takes and has a use for.

    Of input_ids, attention_mask, token_type_ids, langs, cls_index, p_mask, is_impossible, start_positions and
    end_positions. token_type_ids only where the model has more than one type (type_vocab_size), or needs none (XLNet).

    Args: model_or_forward: a model, a model class, or its forward function.
    """
    forward: Callable[..., Any] = getattr(model_or_forward, "forward", model_or_forward)
    known = {"input_ids", "attention_mask", "token_type_ids", "langs", "cls_index", "p_mask", "is_impossible"}
    names = known.union({"start_positions", "end_positions"}).intersection(inspect.signature(forward).parameters)
    facts = FAMILIES.get(str(getattr(model_config, "model_type", "")), _ENCODER)
    if not _sends_types(facts, model_config, otherwise=True):
        names = names - {"token_type_ids"}
    if getattr(model_config, "n_langs", 1) <= 1:
        names = names - {"langs"}
    return frozenset(names)


def _sends_types(facts: _Facts, model_config: Any, otherwise: bool) -> bool:
    """Whether type ids are of use to the model; `otherwise` where neither the table nor the config says."""
    if facts.token_type_ids is not None:
        return facts.token_type_ids
    kinds = getattr(model_config, "type_vocab_size", None)
    return otherwise if kinds is None else int(kinds) > 1


def _pad_token_id(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id", "unk_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    return 0


def _facts_of_unknown(name: str, model_config: Any, tokenizer: Any) -> _Facts:
    """A model outside the table: causal if Transformers lists it as a language model that has no masked form."""
    if not callable(tokenizer) or not hasattr(tokenizer, "padding_side"):
        kind = type(tokenizer).__name__
        raise UserError(f"model type {name!r}: its tokenizer ({kind}) cannot encode a pair of texts")
    if getattr(model_config, "is_encoder_decoder", False):
        return _NO_TYPES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal_names
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as masked_names

    return _DECODER if name in causal_names and name not in masked_names else _ENCODER
