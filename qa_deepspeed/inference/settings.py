"""Settings of an answerer's calls: both spellings of their names, what the model was trained with, and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from qa_deepspeed.inference.inputs import require_whole_number
from qa_deepspeed.qa.features.build import FeatureSettings, check_settings
from qa_deepspeed.utils.errors import UserError

SPELLINGS = {
    "max_seq_length": "max_seq_len",
    "max_answer_length": "max_answer_len",
    "max_query_length": "max_question_len",
    "per_gpu_eval_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "version_2_with_negative": "handle_impossible_answer",
}
"""Name in training and evaluation -> name in the pipeline of Transformers, which has the same meaning."""

WINDOW_SETTINGS = {"max_seq_length", "doc_stride", "doc_stride_is", "max_query_length"}
"""Settings of the training that shape windows, if the model's config has all of them."""


def under_pipeline_names(given: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with the values that `others` has for its names under their other spelling.

    Raises:
        UserError: an argument has two values.
    """
    values = dict(given)
    for name, value in others.items():
        ours = SPELLINGS.get(name)
        if ours is None or value is None:
            continue
        if values.get(ours) is not None:
            raise UserError(f"{name} is another name of {ours}: pass one of them")
        values[ours] = value
    return values


@dataclass(frozen=True)
class ModelLimits:
    """What bounds windows: tokens of the longest row, the tokenizer's own limit, and special tokens of a row."""

    longest_row: int
    tokenizer_limit: int
    special_tokens: int


def window_settings(
    max_seq_len: int | None,
    doc_stride: int | None,
    doc_stride_is: str | None,
    max_question_len: int | None,
    trained: Mapping[str, Any],
    limits: ModelLimits,
) -> FeatureSettings:
    """Windows as asked for; what is None is as the model was trained, or else the pipeline's default.

    By the latter a question is truncated only where a window needs room for new context tokens, and doc_stride is an
    overlap. A trained stride that does not fit a given max_seq_len gives way to the default.

    Raises:
        UserError: a value is not valid, or they leave no room for the context.
    """
    require_whole_number("max_seq_len", max_seq_len, 1)
    require_whole_number("doc_stride", doc_stride, 0)
    require_whole_number("max_question_len", max_question_len, 1)
    if doc_stride_is not in (None, "step", "overlap"):
        raise UserError(f"doc_stride_is must be 'step' or 'overlap', not {doc_stride_is!r}")
    if max_seq_len is not None and max_seq_len > limits.longest_row:
        raise UserError(f"max_seq_len {max_seq_len} is more than the {limits.longest_row} positions of the model")
    if trained.keys() >= WINDOW_SETTINGS:
        length = max_seq_len or min(trained["max_seq_length"], limits.longest_row)
        stride = trained["doc_stride"] if doc_stride is None else doc_stride
        meaning = doc_stride_is or trained["doc_stride_is"]
        question = max_question_len or trained["max_query_length"]
        if doc_stride is not None and max_question_len is None:  # the question yields to the stride
            question = max(1, min(question, _room(length, stride, meaning, limits)))
        settings = FeatureSettings(length, stride, cast(Any, meaning), question)
        try:
            check_settings(settings, limits.special_tokens)
            return settings
        except UserError:
            if max_seq_len is None or doc_stride is not None:
                raise
    meaning = doc_stride_is or "overlap"
    if max_seq_len is None:
        max_seq_len = min(limits.tokenizer_limit, limits.longest_row, trained.get("max_seq_length", 384))
    if doc_stride is None:
        doc_stride = min(max_seq_len // 2, 128)
    room = _room(max_seq_len, doc_stride, meaning, limits)
    if room < 1:
        raise UserError(
            f"doc_stride {doc_stride} leaves no room for a question in max_seq_len {max_seq_len}: "
            "lower doc_stride or raise max_seq_len"
        )
    return FeatureSettings(max_seq_len, doc_stride, cast(Any, meaning), min(room, max_question_len or room))


def _room(length: int, stride: int, meaning: str, limits: ModelLimits) -> int:
    """Tokens that a question can have if every window brings new tokens of the context."""
    return length - limits.special_tokens - stride - (meaning == "overlap")
