"""Rows packed end to end as one sequence: for which models, decided by trying.

A model packs if its logits of packed rows are those of padded rows. Positions restart with every row, attention stays
within a row (row_attention.py); what else a model does along the sequence (relative positions of T5, convolutions,
memories) shows in the comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.attention.row_attention import set_row_attention
from qa_deepspeed.models.transformers_compat import attention_implementation
from qa_deepspeed.qa.features.batching import Batch, Layout, Packing, make_batch
from qa_deepspeed.qa.features.store import FeatureRows, FeatureStore
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError

AFTER_PADDING = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "roberta-prelayernorm"}
"""Model types whose positions begin after the pad token's id, as in fairseq."""

PACKED_FAMILIES = AFTER_PADDING | {
    *("bert", "distilbert", "electra", "albert", "ernie", "modernbert"),
    *("gpt2", "gpt_neox", "opt", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "arcee", "exaone4"),
    *("ministral", "qwen3_moe", "smollm3"),
}
"""Model types that pack by test. Under ZeRO-3, where no rank has the whole model to try, only these do."""

TOLERANCES = {"fp32": 2e-4, "bf16": 5e-2, "fp16": 1e-2, "torch_autocast": 5e-2}
"""Largest difference between logits of packed and padded rows, relative to the range of the padded ones."""

TRIAL_ERRORS = (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError)
"""What models raise that do not take these arguments, or not in these shapes."""

TOKEN_MULTIPLES = {"cpu": 1, "cuda": 64}
"""By device: packed micro-batches are filled up to a multiple of this many tokens, efficient on tensor cores."""

Forward = Callable[[dict[str, Any]], Any]
"""A model's forward pass, from its arguments to its outputs."""


def choose_packing(
    model: Any, options: RunOptions, store: FeatureStore, layout: Layout, zero_stage: int, packed_before: bool | None
) -> Packing | None:
    """How the training rows are packed; None for padded rows. Rank 0 tries, all ranks follow. Collective.

    Under ZeRO-3 no rank has the model to try: a known model type packs, and `confirm_packing` tries with the engine.

    Args:
        model: with its weights in float32. layout: of padded rows.
        packed_before: whether the run that is resumed packed its rows; None for a new run.
    Raises:
        UserError: packed rows are asked for, and the model cannot have them.
    """
    if options.batch_layout == "padded" or (packed_before is False and options.batch_layout != "packed"):
        return None
    found: Packing | str | None
    if options.attn_implementation not in (None, "flash_attention_2"):
        found = f"--attn_implementation {options.attn_implementation} knows no packed rows"
    elif zero_stage == 3:
        found = packing_by_name(model.config) or f"no {model.config.model_type} was tested with packed rows"
    else:
        rows = rows_to_try(store.lengths)
        tried = dist.run_on_rank_zero(lambda: _tried(packing_of(model, store.take, rows, layout)))
        found = Packing(tried) if isinstance(tried, int) else tried
    if isinstance(found, Packing):
        return found
    _refuse_if_asked(options, packed_before, found)
    return None


def _tried(found: Packing | str) -> int | str:
    """What rank 0 broadcasts: the first position id, or the reason against packing."""
    return found if isinstance(found, str) else found.first_position


def _refuse_if_asked(options: RunOptions, packed_before: bool | None, reason: str) -> None:
    if options.batch_layout == "packed":
        raise UserError(f"this model's rows cannot be packed: {reason}; leave --batch_layout packed out")
    if packed_before:
        raise UserError(
            f"the rows of this run were packed, and now cannot be: {reason}; --batch_layout padded resumes with padded "
            "ones"
        )


def confirm_packing(
    engine: Any, options: RunOptions, store: FeatureStore, layout: Layout, packed_before: bool | None
) -> Packing | None:
    """The layout's packing if the engine's logits of packed rows are those of padded ones. Collective.

    Args: engine: an `EvalModel`.
    Raises: UserError as `choose_packing`.
    """
    assert layout.packing is not None
    with engine.evaluating():
        rows, tolerance = rows_to_try(store.lengths), TOLERANCES[engine.precision]
        reason = difference(
            lambda inputs: engine.eval_forward(_on(engine.device, inputs)),
            store.take,
            rows,
            layout,
            layout.packing,
            tolerance,
        )
    reason = dist.run_on_rank_zero(lambda: reason)
    if reason is None:
        return layout.packing
    _refuse_if_asked(options, packed_before, reason)
    dist.log0(f"rows are padded: {reason}")
    return None


def _on(device: torch.device, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}


def rows_to_try(lengths: np.ndarray) -> np.ndarray:
    """Row numbers for the comparison: one of medium length, the longest and the shortest.

    Args: lengths: `[features]` tokens of each row, at least one.
    """
    order = np.argsort(lengths, kind="stable")
    return order[[len(order) // 2, -1, 0]]


def packing_of(
    model: Any, take: Callable[[np.ndarray], FeatureRows], rows: np.ndarray, layout: Layout
) -> Packing | str:
    """How a whole model in float32 wants packed rows, found by trying; or why it cannot have them. Sets `row_attention`
    for the time of the trial.

    Args:
        take: the features' rows. rows: numbers of some of them.
    """
    before, training = attention_implementation(model), model.training
    if not set_row_attention(model):
        return "it does not work with the attention that packed rows need"
    try:
        model.eval()
        with torch.inference_mode():
            reasons = []
            for first_position in _first_positions(model.config):
                packing = Packing(first_position)
                reason = difference(lambda inputs: model(**inputs), take, rows, layout, packing, TOLERANCES["fp32"])
                if reason is None:
                    return packing
                reasons.append(reason)
            return reasons[0]
    finally:
        model.train(training)
        model.set_attn_implementation(before)


def packing_by_name(config: Any) -> Packing | None:
    """The packing of a model type in `PACKED_FAMILIES`; None for others."""
    return Packing(_first_positions(config)[0]) if config.model_type in PACKED_FAMILIES else None


def packs_by_name(options: RunOptions, config: Any) -> bool:
    """Whether a run is expected to pack its rows, before the model can be tried."""
    return options.batch_layout != "padded" and packing_by_name(config) is not None


def _first_positions(config: Any) -> list[int]:
    """Position ids that a row's first token may have in such a model, the likeliest first."""
    after_padding = (getattr(config, "pad_token_id", None) or 0) + 1
    if config.model_type in AFTER_PADDING:
        return [after_padding]
    return [0] if config.model_type in PACKED_FAMILIES else [0, after_padding]


def difference(
    forward: Forward,
    take: Callable[[np.ndarray], FeatureRows],
    rows: np.ndarray,
    layout: Layout,
    packing: Packing,
    tolerance: float,
) -> str | None:
    """Why logits of packed rows are not those of padded ones; None if they are. Collective if `forward` is."""
    padded = make_batch(take, rows, dataclasses.replace(layout, packing=None))
    packed = make_batch(take, rows, dataclasses.replace(layout, packing=packing))
    expected = real_logits(forward(padded.inputs), padded)
    try:
        found = real_logits(forward(packed.inputs), packed)
    except TRIAL_ERRORS as error:
        return f"it takes no packed rows ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    span = float(expected.max() - expected.min())
    if span == 0.0:
        return "its logits are all equal, so that nothing can be compared"
    largest = float((found - expected).abs().max())
    if not largest <= tolerance * span:
        return f"logits of packed rows differ by {largest:.1e}, in a range of {span:.1e}"
    return None


def real_logits(outputs: Any, batch: Batch) -> torch.Tensor:
    """Start and end logits of all tokens, float32 `[2, tokens]`."""
    by_row = batch.by_row(outputs)
    token = torch.arange(by_row.start_logits.shape[1]) - batch.shift.unsqueeze(1)
    real = (token >= 0) & (token < batch.length.unsqueeze(1))
    return torch.stack([logits.float().cpu()[real] for logits in (by_row.start_logits, by_row.end_logits)])
