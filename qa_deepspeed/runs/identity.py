"""What makes a run this run: the settings that must be the same for it to be gone on with, and what differs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qa_deepspeed.config.options import nearest
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.checkpoint_files import LoopState
from qa_deepspeed.engine.ds_config import ResolvedConfig, section_in_words
from qa_deepspeed.utils.errors import UserError

OWN_NUMBERS = (
    "model_name_or_path",
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "warmup_steps",
    "objective",
    "label_smoothing",
    "seed",
)
"""Options that count by themselves."""

BEHIND = {
    "features": (
        "train_file",
        "data_dir",
        "dataset_name",
        "dataset_config",
        "train_split",
        "max_seq_length",
        "doc_stride",
        "doc_stride_is",
        "max_query_length",
        "windows_without_answer",
        "max_train_examples",
        "version_2_with_negative",
        "do_lower_case",
        "tokenizer_name",
    ),
    "steps": ("num_train_epochs", "max_steps"),
    "global_batch_size": ("per_gpu_train_batch_size", "gradient_accumulation_steps"),
    "precision": ("bf16", "fp16", "fp16_opt_level"),
    "lora": ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"),
}
"""What counts as one thing -> the options that it comes from."""

FIXED = ("head", "optimizer", "scheduler", "lora")
"""What weights or optimizer state of a checkpoint are made for: no run goes on with another."""

FOLLOWS = {"steps": ("features", "global_batch_size")}
"""What changes by itself when something else does."""


def identity(resolved: ResolvedConfig, features: str, steps: int, head: str) -> dict[str, Any]:
    """What must be the same for a run to be gone on with; everything else may change between two starts.

    Args:
        features: fingerprint of the training rows. head: as `loading.head_kind`.
    """
    options = resolved.options
    adapters = [getattr(options, name) for name in BEHIND["lora"]] if options.lora_rank is not None else None
    return {name: getattr(options, name) for name in OWN_NUMBERS} | {
        "lora": adapters,
        "features": features,
        "steps": steps,
        "global_batch_size": resolved.plan.global_batch_size,
        "precision": resolved.precision,
        "head": head,
        "optimizer": section_in_words(resolved.config, "optimizer"),
        "scheduler": section_in_words(resolved.config, "scheduler"),
    }


def refuse_changes(
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    their_options: Mapping[str, Any],
    options: RunOptions,
    where: str,
) -> None:
    """Refuse to go on with the run in `where` if it differs in anything that `resume_with_changes` does not name.

    Raises:
        UserError: each difference with its name, old and new value.
    """
    allowed = _allowed(options)
    allowed |= {name for name, causes in FOLLOWS.items() if allowed & set(causes)}
    different = [
        name
        for name in dict.fromkeys((*OWN_NUMBERS, *BEHIND, *FIXED))
        if theirs.get(name) != ours.get(name) and name not in allowed
    ]
    if not different:
        return
    told = "; ".join(_difference(name, theirs.get(name), ours.get(name), their_options, options) for name in different)
    ways = "Pass another --output_dir, or --overwrite_output_dir to start afresh"
    if not set(different) & set(FIXED):
        ways += ", or --resume_with_changes NAME[,NAME] to go on with these changes"
    raise UserError(f"{where} holds another run: {told}. {ways}")


def _allowed(options: RunOptions) -> set[str]:
    """The parts of the identity that `resume_with_changes` names, by their own names or by those of their options."""
    parts = {name: name for name in (*OWN_NUMBERS, *BEHIND) if name not in FIXED}
    parts |= {option: part for part, behind in BEHIND.items() if part not in FIXED for option in behind}
    named = [name.strip() for name in (options.resume_with_changes or "").split(",") if name.strip()]
    for name in named:
        if name not in parts:
            raise UserError(
                f"resume_with_changes names '{name}', which may always change, or never, or is no option"
                f"{nearest(name, parts)}"
            )
    return {parts[name] for name in named}


def may_change(part: str, options: RunOptions) -> bool:
    """Whether `resume_with_changes` names this part of the identity."""
    return part in _allowed(options)


def _difference(name: str, old: Any, new: Any, their_options: Mapping[str, Any], options: RunOptions) -> str:
    ours = options.to_dict()
    changed = [
        f"{option} was {their_options[option]}, is {ours[option]}"
        for option in BEHIND.get(name, ())
        if option in their_options and their_options[option] != ours[option]
    ]
    if changed:
        return "; ".join(changed)
    if name == "features":
        return f"{options.data_file('train') or options.dataset_name} holds or gives other training rows than it did"
    return f"{name} was {old}, is {new}"


def completed_steps(state: LoopState, ours: Mapping[str, Any], rows: int) -> int:
    """Optimizer steps that this run counts as done where a checkpoint of the state `state` goes on in it.

    With another global batch that is the same share of the same epoch, rounded down to whole steps.
    """
    theirs, batch = state.identity["global_batch_size"], ours["global_batch_size"]
    if theirs == batch:
        return state.step
    epoch, within = divmod(state.step, -(-state.rows // theirs))
    return epoch * -(-rows // batch) + within * theirs // batch


def other_versions(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which versions differ between the writing of a checkpoint and now, in words; empty if none does."""
    changed = (name for name in now if then.get(name, now[name]) != now[name])
    return ", ".join(f"{name} {then[name]} then, {now[name]} now" for name in changed)
