"""A model's config, tokenizer and family, known before its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.layers import check_layers
from qa_deepspeed.models.loading import check_attention, check_vocabulary, load_config, load_tokenizer
from qa_deepspeed.models.student_layers import check_student_layers
from qa_deepspeed.qa.features.batching import Layout
from qa_deepspeed.qa.features.families import Family, family_of
from qa_deepspeed.utils.errors import UserError


@dataclass(frozen=True)
class ModelFacts:
    """Config, tokenizer and family of a model, without its weights."""

    config: PretrainedConfig
    tokenizer: Any
    family: Family

    def layout(self, columns: frozenset[str], lang_id: int) -> Layout:
        """The padding of rows for a model that takes `columns`."""
        return Layout(
            pad_token_id=self.family.pad_token_id,
            pad_type_id=getattr(self.tokenizer, "pad_token_type_id", 0) or 0,
            padding_side=self.family.padding_side,
            columns=columns,
            lang_id=lang_id,
        )


def model_facts(options: RunOptions) -> ModelFacts:
    """Config, tokenizer and family of the options' model.

    Raises:
        UserError: as in models/loading.py; the tokenizer is another model's; max_seq_length exceeds the positions; the
            model cannot work with attn_implementation, freeze or layerwise_lr_decay; student_layers cannot be chosen.
    """
    config = load_config(options)
    check_attention(options, config)
    check_layers(options, config)
    check_student_layers(options)
    tokenizer = load_tokenizer(options)
    check_vocabulary(options.model_name_or_path, config, tokenizer)
    family = family_of(config, tokenizer)
    longest = positions(config)
    if longest is not None and longest < options.max_seq_length:
        raise UserError(
            f"max_seq_length {options.max_seq_length} is more than the {longest} positions of "
            f"{options.model_name_or_path}; pass at most that"
        )
    return ModelFacts(config, tokenizer, family)


def positions(config: Any) -> int | None:
    """Maximum length of a row in tokens; None if the config sets no limit."""
    longest = getattr(config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None
