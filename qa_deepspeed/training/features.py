"""From options to features: resolves data files, feature settings and cache folder."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from qa_deepspeed.config.option_groups import AUTO
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.facts import ModelFacts
from qa_deepspeed.qa.cache.prepare import look_up, look_up_rows_by_file, prepare_features
from qa_deepspeed.qa.data.hub import hub_file
from qa_deepspeed.qa.data.reading import ColumnNames, DataSource
from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.qa.features.mixture import epoch_size
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.home import user_cache
from qa_deepspeed.utils.progress import ProgressBar
from qa_deepspeed.utils.units import plural

Purpose = Literal["train", "evaluate"]

EPOCH_ROWS = "epoch_rows"
"""Name of the number of rows that an epoch has, among the counts of `look_up_features`."""


def load_features(options: RunOptions, purpose: Purpose, facts: ModelFacts) -> FeatureStore:
    """The features of the training or evaluation data, from the cache or built now.

    Every rank calls this, in any order; no collective may be in progress.

    Raises:
        UserError: no data is named, or it cannot be read.
    """
    folder, source = _cache_folder_and_source(options, purpose)
    settings = _settings_for(options, purpose)
    with ProgressBar(f"features of the {purpose} file", None, "question", shown=dist.is_rank_zero()) as bar:
        return prepare_features(
            source,
            facts.tokenizer,
            facts.family,
            settings,
            folder,
            overwrite=dist.run_token(options.timeout) if options.overwrite_cache else None,
            progress=bar.reach,
            timeout_seconds=options.timeout,
        )


def look_up_features(options: RunOptions, purpose: Purpose, facts: ModelFacts) -> tuple[str, dict[str, int] | None]:
    """Fingerprint of the features that `load_features` would return, and their counts if they are cached.

    The counts of training data have the rows of an epoch as `EPOCH_ROWS`.
    """
    folder, source = _cache_folder_and_source(options, purpose)
    where = (source, facts.tokenizer, facts.family, _settings_for(options, purpose), folder)
    fingerprint, counts = look_up(*where)
    if counts is None or purpose != "train":
        return fingerprint, counts
    weights = file_weights(options)
    rows = np.array([counts["features"]]) if weights is None else look_up_rows_by_file(*where)
    return fingerprint, counts | {EPOCH_ROWS: epoch_size(rows, weights)}


def file_weights(options: RunOptions) -> tuple[float, ...] | None:
    """The weight of each training file, in the order of the files; None where all rows count once.

    Raises:
        UserError: there is no such file, or one has several weights.
    """
    patterns = options.weighted_patterns("train")
    if all(weight == 1 for weight in patterns.values()):
        return None
    weights: dict[str, float] = {}
    for pattern, weight in patterns.items():
        for file in DataSource.resolve(pattern):
            if weights.setdefault(file, weight) != weight:
                raise UserError(f"train_file names {file} with the weights {weights[file]:g} and {weight:g}")
    return tuple(weights.values())


def _settings_for(options: RunOptions, purpose: Purpose) -> FeatureSettings:
    """Evaluation ignores labels, so that runs with different `answers` share its features."""
    settings = feature_settings(options)
    return settings if purpose == "train" else dataclasses.replace(settings, answers="first")


def warnings_of_files(options: RunOptions) -> list[str]:
    """A line for the log if a file of the evaluation is trained on too, by whatever path."""
    if options.validation_split:
        return []
    files = {purpose: DataSource.resolve(options.data_patterns(purpose)) for purpose in ("train", "evaluate")}
    trained = {os.path.realpath(file) for file in files["train"]}
    both = [file for file in files["evaluate"] if os.path.realpath(file) in trained]
    if not both:
        return []
    which = both[0] if len(both) == 1 else f"{both[0]} and {plural(len(both) - 1, 'more file')}"
    return [f"WARNING: trained on and evaluated on: {which}: scores will be too high"]


def data_source(options: RunOptions, purpose: Purpose, files: tuple[str, ...], by_file: bool = False) -> DataSource:
    """The settings that reading `files` depends on. by_file: as in `DataSource`."""
    return DataSource(
        files=files,
        purpose=purpose,
        version_2_with_negative=options.version_2_with_negative,
        max_examples=options.max_train_examples if purpose == "train" else options.max_eval_examples,
        seed=options.seed,
        encoding=options.encoding,
        by_file=by_file,
        validation=(options.validation_split, options.seed) if options.validation_split else None,
        columns=ColumnNames(
            **{one.name: getattr(options, f"{one.name}_column") for one in dataclasses.fields(ColumnNames)}
        ),
    )


def feature_settings(options: RunOptions) -> FeatureSettings:
    """The settings that building features depends on."""
    return FeatureSettings(
        max_seq_length=options.max_seq_length,
        doc_stride=options.doc_stride,
        doc_stride_is=cast(Any, options.doc_stride_is),
        max_query_length=options.max_query_length,
        answers=cast(Any, options.answers),
        windows_without_answer=cast(Any, options.windows_without_answer),
    )


def notes(store: FeatureStore) -> list[str]:
    """Notes for the log about truncated or lost questions, one line each; empty if there are none."""
    kinds = (
        ("truncated_questions", "question", "cut to max_query_length"),
        ("examples_without_tokens", "question", "whose context has no tokens"),
        ("windows_without_answer", "window", "without the answer of their question"),
        ("answers_in_no_window", "question", "whose answers are in no window"),
    )
    counted = ((store.counts.get(name, 0), noun, what) for name, noun, what in kinds)
    found = [f"{plural(count, noun)} {what}" for count, noun, what in counted if count]
    unplaced = store.examples.unplaced() if store.report.answer_faults else np.zeros(0, dtype=bool)
    if unplaced.any():
        windows = int(unplaced[np.asarray(store.example_index)].sum())
        found.append(
            f"{plural(int(unplaced.sum()), 'question')} and {plural(windows, 'window')} of these have faulty gold "
            "answers only, which are not in the context"
        )
    if store.without_gold:
        found.append(f"{plural(store.without_gold, 'question')} without gold answers, answered and not scored")
    return found


def require_gold(store: FeatureStore, options: RunOptions) -> None:
    """Refuse evaluation data without any gold answer where the options need scores.

    Raises:
        UserError: names the options, the file and the column that was looked for.
    """
    if store.without_gold < len(store.examples):
        return
    asked = [f"metric_for_best_model {options.metric_for_best_model}"] if options.metric_for_best_model else []
    if options.null_score_diff_threshold == AUTO:
        asked.append("null_score_diff_threshold auto")
    if asked:
        raise UserError(
            f"{', '.join(asked)} needs scores, but none of the {len(store.examples):,} questions of "
            f"{options.data_file('evaluate') or options.dataset_name} has gold answers (looked for "
            f"'{options.answers_column}'; --answers_column names another column)"
        )


def _cache_folder_and_source(options: RunOptions, purpose: Purpose) -> tuple[Path, DataSource]:
    """Cache folder and source for `purpose`. Examples are known by file where scores or weights are those of a file."""
    folder, files = _cache_folder_and_files(options, purpose)
    by_file = len(files) > 1 and (purpose == "evaluate" or file_weights(options) is not None)
    return folder, data_source(options, purpose, files, by_file)


def _cache_folder_and_files(options: RunOptions, purpose: Purpose) -> tuple[Path, tuple[str, ...]]:
    """Cache folder and data files for `purpose`; a data set of the hub is downloaded into the cache folder."""
    patterns = options.data_patterns(purpose)
    if patterns:
        files = DataSource.resolve(patterns)
        return cache_folder(options.cache_dir, Path(files[0])), files
    if options.dataset_name:
        folder = cache_folder(options.cache_dir or str(user_cache() / "qa_deepspeed"), Path())
        trains = purpose == "train" or options.validation_split > 0
        split = options.train_split if trains else options.predict_split
        hub_cache = str(Path(options.cache_dir) / "hub") if options.cache_dir else None
        return folder, (hub_file(options.dataset_name, options.dataset_config, split, folder, hub_cache),)
    flag = "train_file" if purpose == "train" else "predict_file"
    raise UserError(f"no data is named: pass --{flag}, --dataset_name, or --data_dir with the file names of SQuAD")


def features_folder(options: RunOptions) -> Path:
    """The folder of the training features' cache entries."""
    return _cache_folder_and_files(options, "train")[0]


def cache_folder(cache_dir: str | None, data_file: Path) -> Path:
    """Folder of the features: in cache_dir, else beside the data, else (read-only data) in the user's cache folder."""
    if cache_dir:
        return Path(cache_dir) / "features"
    beside = data_file.resolve().parent
    if os.access(beside, os.W_OK):
        return beside / ".qa_deepspeed_features"
    return user_cache() / "qa_deepspeed" / "features"
