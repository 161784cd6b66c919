"""The fingerprint of a run: settings that must match to resume, and what differs from a checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qa_deepspeed.config.options import nearest
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.checkpoints.checkpoint_files import LoopState
from qa_deepspeed.engine.ds_config import ResolvedConfig, section_in_words
from qa_deepspeed.models.layers import named_places
from qa_deepspeed.models.loading import chosen_layers
from qa_deepspeed.utils.errors import UserError

FINGERPRINT_OPTIONS = (
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
    "group_by_length",
)
"""Options that are parts of the fingerprint themselves."""

OPTIONS_OF_PART = {
    "mixture": ("train_file",),
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
        "validation_split",
        "version_2_with_negative",
        "do_lower_case",
        "tokenizer_name",
    ),
    "steps": ("num_train_epochs", "max_steps"),
    "global_batch_size": ("per_gpu_train_batch_size", "gradient_accumulation_steps"),
    "precision": ("bf16", "fp16", "fp16_opt_level"),
    "layers": ("layerwise_lr_decay", "freeze"),
    "lora": ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"),
    "distillation": ("teacher_model_name_or_path", "distillation_weight", "distillation_temperature"),
}
"""Part of the fingerprint -> the options it is derived from. An option of two parts stands for the later one in
`resume_with_changes`."""

FIXED = ("head", "optimizer", "scheduler", "layers", "lora", "student_layers")
"""Parts that the weights or the optimizer state of a checkpoint depend on: they can never change."""

CHANGES_WITH = {"steps": ("features", "global_batch_size", "mixture"), "mixture": ("features",)}
"""Part -> the parts that it follows: it may change when one of them may."""


def run_fingerprint(
    resolved: ResolvedConfig,
    features: str,
    steps: int,
    head: str,
    weights: Sequence[float] | None = None,
    teachers: Sequence[str] = (),
) -> dict[str, Any]:
    """Settings that must match the checkpoint to resume; all others may change.

    Args:
        features: fingerprint of the training rows. head: as `loading.head_kind`.
        weights: of the training files (`features.file_weights`); part of the fingerprint only where there are some.
        teachers: digests of the teachers' weights; the same.
    """
    options = resolved.options
    adapters = [getattr(options, name) for name in OPTIONS_OF_PART["lora"]] if options.lora_rank is not None else None
    named = {name: getattr(options, name) for name in FINGERPRINT_OPTIONS}
    if options.group_by_length is None:  # then the layout of the batches decides, or the checkpoint
        del named["group_by_length"]
    # these are parts only where they are used: finished runs of earlier versions stay finished
    used: dict[str, Any] = {} if weights is None else {"mixture": list(weights)}
    if options.freeze is not None or options.layerwise_lr_decay != 1:
        used["layers"] = [options.layerwise_lr_decay, *sorted(named_places(options.freeze))]
    if options.student_layers is not None:
        used["student_layers"] = list(chosen_layers(options) or ())
    if teachers:
        used["distillation"] = [options.distillation_weight, options.distillation_temperature, *teachers]
    return (
        named
        | used
        | {
            "lora": adapters,
            "features": features,
            "steps": steps,
            "global_batch_size": resolved.plan.global_batch_size,
            "precision": resolved.precision,
            "head": head,
            "optimizer": section_in_words(resolved.config, "optimizer"),
            "scheduler": section_in_words(resolved.config, "scheduler"),
        }
    )


def refuse_changes(
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    their_options: Mapping[str, Any],
    options: RunOptions,
    where: str,
) -> None:
    """Refuse to resume the run in `where` if it differs in anything that `resume_with_changes` does not name.

    Raises:
        UserError: each difference with its name, old and new value.
    """
    allowed = _allowed(options)
    allowed |= {name for name, causes in CHANGES_WITH.items() if allowed & set(causes)}
    different = [
        name
        for name in dict.fromkeys((*FINGERPRINT_OPTIONS, *OPTIONS_OF_PART, *FIXED))
        if theirs.get(name) != ours.get(name) and name not in allowed
    ]
    if not different:
        return
    said = [_difference(name, theirs.get(name), ours.get(name), their_options, options) for name in different]
    differences = "; ".join(dict.fromkeys(said))  # two parts may follow from one option
    ways = "Pass another --output_dir, or --overwrite_output_dir to start again"
    if not set(different) & set(FIXED):
        ways += ", or --resume_with_changes NAME[,NAME] to resume with these changes"
    raise UserError(f"{where} holds another run: {differences}. {ways}")


def _allowed(options: RunOptions) -> set[str]:
    """Parts of the fingerprint that `resume_with_changes` names, by their own names or those of their options."""
    parts = {name: name for name in (*FINGERPRINT_OPTIONS, *OPTIONS_OF_PART) if name not in FIXED}
    parts |= {option: part for part, behind in OPTIONS_OF_PART.items() if part not in FIXED for option in behind}
    named = [name.strip() for name in (options.resume_with_changes or "").split(",") if name.strip()]
    for name in named:
        if name not in parts:
            raise UserError(
                f"resume_with_changes names '{name}', which is unknown, can always change, or can never change"
                f"{nearest(name, parts)}"
            )
    return {parts[name] for name in named}


def may_change(part: str, options: RunOptions) -> bool:
    """Whether `resume_with_changes` names this part of the fingerprint."""
    return part in _allowed(options)


def _difference(name: str, old: Any, new: Any, their_options: Mapping[str, Any], options: RunOptions) -> str:
    ours = options.to_dict()
    changed = [
        f"{option} was {their_options[option]}, is {ours[option]}"
        for option in OPTIONS_OF_PART.get(name, ())
        if option in their_options and their_options[option] != ours[option]
    ]
    if changed:
        return "; ".join(changed)
    if name == "distillation" and old and new:
        return f"the weights of {options.teacher_model_name_or_path} are others than before"
    if name == "features":
        return f"{options.data_file('train') or options.dataset_name} gives other training rows than before"
    return f"{name} was {old}, is {new}"


def completed_steps(state: LoopState, ours: Mapping[str, Any], rows: int) -> int:
    """Optimizer steps that count as completed when this run resumes from a checkpoint with the state `state`.

    With another global batch size that is the same fraction of the same epoch, rounded down to whole steps.
    """
    theirs, batch = state.identity["global_batch_size"], ours["global_batch_size"]
    if theirs == batch:
        return state.step
    epoch, within = divmod(state.step, -(-state.rows // theirs))
    steps: int = epoch * -(-rows // batch) + within * theirs // batch
    return steps


def other_versions(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Versions that differ between the writing of a checkpoint and now, in words; empty if none does."""
    changed = (name for name in now if then.get(name, now[name]) != now[name])
    return ", ".join(f"{name} {then[name]} then, {now[name]} now" for name in changed)
