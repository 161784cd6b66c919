"""What a run is asked to do: the options of all groups, and the checks that need no data and no device."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Any

from qa_deepspeed.config.option_groups import (
    CheckpointOptions,
    DataOptions,
    DeprecatedOptions,
    DistillationOptions,
    EngineOptions,
    EvaluationOptions,
    LoggingOptions,
    ModelOptions,
    TrainingOptions,
)
from qa_deepspeed.config.options import fields_of
from qa_deepspeed.qa.data.files import split_weight
from qa_deepspeed.utils.errors import UserError


@dataclass(frozen=True)
class RunOptions(
    DeprecatedOptions,
    LoggingOptions,
    EngineOptions,
    CheckpointOptions,
    EvaluationOptions,
    DistillationOptions,
    TrainingOptions,
    ModelOptions,
    DataOptions,
):
    """The options of one run; the flags of the classic run_squad.py with their defaults, and what DeepSpeed adds."""

    config_file: str | None = field(default=None, compare=False)
    """The YAML file of --config, if there was one."""
    given: frozenset[str] = field(default=frozenset())
    """Names of the options that the command line or the YAML file set; the others have their defaults."""
    given_in_file: frozenset[str] = field(default=frozenset(), compare=False)
    """Those of them that the YAML file set and the command line did not."""

    def __repr__(self) -> str:
        chosen = self.chosen
        shown = [f"{name}={getattr(self, name)!r}" for name in self.to_dict() if name in chosen]
        return f"RunOptions({', '.join(shown)})"

    @property
    def chosen(self) -> frozenset[str]:
        """Names of the options that were set: `given`, and those that differ from their default (made in Python)."""
        defaults = {field.name: field.default for field in fields_of(type(self))}
        return self.given | {name for name, value in defaults.items() if getattr(self, name) != value}

    def to_dict(self) -> dict[str, Any]:
        """Every option by name, as plain values."""
        values = dataclasses.asdict(self)
        for name in ("given", "given_in_file", "config_file"):
            del values[name]
        return values

    @property
    def evaluates_during_training(self) -> bool:
        """Whether the run is evaluated before its end: eval_steps implies it, unless it is switched off."""
        said = "evaluate_during_training" in self.given
        return self.evaluate_during_training or (self.eval_steps is not None and not said)

    @property
    def trackers(self) -> frozenset[str]:
        """Where curves go: the parts of `report_to`, TensorBoard where it is left out, nothing for none."""
        named = self.report_to if self.report_to is not None else "tensorboard"
        return frozenset(part.strip() for part in named.split(",")) - {"none"}

    @property
    def teachers(self) -> tuple[str, ...]:
        """The models that the run learns from; none where their part of the loss weighs nothing."""
        names = (name.strip() for name in (self.teacher_model_name_or_path or "").split(","))
        return tuple(name for name in names if name) if self.distillation_weight else ()

    def origin(self, name: str) -> str:
        """Where the value of an option comes from, in words: the command line, the YAML file, or default."""
        if name in self.given_in_file:
            return str(self.config_file)
        return "the command line" if name in self.given else "default"

    def data_file(self, purpose: str) -> str | None:
        """The file named for `purpose` ("train" or "evaluate"), or the classic name; in data_dir, if there is one.

        As run_squad.py has it: without data_dir there is no classic name, and absolute paths stay as they are. With
        validation_split both are the training file.
        """
        trains = purpose == "train" or self.validation_split > 0
        named = self.train_file if trains else self.predict_file
        if not self.data_dir:
            return named
        version = "v2.0" if self.version_2_with_negative else "v1.1"
        named = named or f"{'train' if trains else 'dev'}-{version}.json"
        return ",".join(os.path.join(self.data_dir, os.path.expanduser(part)) for part in named.split(","))

    def data_patterns(self, purpose: str) -> tuple[str, ...]:
        """The paths and glob patterns of `data_file`, which commas separate unless a file has the whole name."""
        return tuple(self.weighted_patterns(purpose))

    def weighted_patterns(self, purpose: str) -> dict[str, float]:
        """`data_patterns` and their weights: training files may be named as `squad.json=2`.

        Raises:
            UserError: a weight cannot be, or a path is named with several.
        """
        named = self.data_file(purpose) or ""
        if os.path.exists(named):
            return {named: 1.0}
        parts = [part for part in named.split(",") if part]
        weights: dict[str, float] = {}
        for part in parts:
            trains = purpose == "train" or self.validation_split > 0
            pattern, weight = split_weight(part) if trains else (part, 1.0)
            if weights.setdefault(pattern, weight) != weight:
                raise UserError(f"train_file names {pattern} with the weights {weights[pattern]:g} and {weight:g}")
        return weights


def missing_options(options: RunOptions, trains: bool) -> list[str]:
    """Flags that a run needs and that are not given, each with its meaning; one that trains, or only evaluates."""
    evaluates = options.do_eval or options.evaluates_during_training or not trains
    needed = {
        "--model_name_or_path (a folder of a model, or a name on the hub)": bool(options.model_name_or_path),
        "--train_file (or --dataset_name, or --data_dir)": not trains or _names_data(options, "train"),
        "--predict_file (or --validation_split 0.1)"
        if trains
        else "--predict_file (or --dataset_name, or --data_dir)": (not evaluates or _names_data(options, "evaluate")),
        "--output_dir (a folder for the model, checkpoints and predictions)": not trains or bool(options.output_dir),
    }
    return [flag for flag, given in needed.items() if not given]


def _names_data(options: RunOptions, purpose: str) -> bool:
    return bool(options.data_file(purpose) or options.dataset_name)


MINIMUM = {
    "logging_steps": 1,
    "per_gpu_eval_batch_size": 1,
    "n_best_size": 1,
    "max_answer_length": 1,
    "timeout": 1,
    "save_total_limit": 1,
    "save_retry": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "adam_epsilon": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "seed": 0,
}
"""The least that a number may be."""

SEEDS = 2**32
"""Seeds are less than this: numpy takes no others."""


def check_counts(options: RunOptions) -> None:
    """Raises UserError for a number that is too small or not finite."""
    for name, least in MINIMUM.items():
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"{name} must be at least {least}, not {value}")
    if not 0 <= options.validation_split < 1:
        raise UserError(f"validation_split must be at least 0 and less than 1, not {options.validation_split}")
    if options.validation_split and options.predict_file:
        raise UserError("validation_split takes the evaluation from train_file: leave it or --predict_file out")
    if not 0 < options.layerwise_lr_decay <= 1:
        raise UserError(f"layerwise_lr_decay must be more than 0 and at most 1, not {options.layerwise_lr_decay}")
    if "none" in (options.report_to or "").replace(" ", "").split(",") and options.trackers:
        raise UserError(f"report_to {options.report_to}: none excludes the others")
    if options.seed >= SEEDS:
        raise UserError(f"seed must be less than {SEEDS}, not {options.seed}")
    if options.max_steps <= 0 and not 0 < options.num_train_epochs < math.inf:
        raise UserError(f"num_train_epochs must be more than 0, not {options.num_train_epochs}")


def check_objective(options: RunOptions) -> None:
    """Raises UserError where the options of the loss and of micro-batches by tokens conflict."""
    if options.objective == "marginal" and options.answers != "all":
        raise UserError("objective marginal sums over all gold spans: it needs --answers all")
    if not 0 <= options.label_smoothing < 1:
        raise UserError(f"label_smoothing must be at least 0 and less than 1, not {options.label_smoothing}")
    if options.max_tokens_per_batch is not None and options.max_tokens_per_batch < options.max_seq_length:
        raise UserError(
            f"max_tokens_per_batch {options.max_tokens_per_batch} does not hold one row of max_seq_length "
            f"{options.max_seq_length}: raise it, or lower --max_seq_length"
        )


def check_distillation(options: RunOptions) -> None:
    """Raises UserError where the options of distillation are out of range, or have no teacher."""
    if not 0 <= options.distillation_weight <= 1:
        raise UserError(f"distillation_weight must be from 0 to 1, not {options.distillation_weight}")
    if not 0 < options.distillation_temperature < math.inf:
        raise UserError(f"distillation_temperature must be more than 0, not {options.distillation_temperature}")
    given = sorted(name for name in options.given if name.startswith("distillation_"))
    if given and not options.teacher_model_name_or_path:
        raise UserError(f"{', '.join(given)} without a teacher: pass --teacher_model_name_or_path, or leave them out")
