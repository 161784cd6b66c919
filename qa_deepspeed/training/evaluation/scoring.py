"""Decoding and scoring on rank 0: from gathered candidates to answers, metrics, report and files."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qa_deepspeed.config.option_groups import AUTO
from qa_deepspeed.config.options import as_flags
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.qa.decoding.classic import classic_text, decode_classic
from qa_deepspeed.qa.decoding.exact import Candidates, decode
from qa_deepspeed.qa.decoding.full_logits import FullLogits
from qa_deepspeed.qa.decoding.hf import decode_like_transformers
from qa_deepspeed.qa.decoding.predictions import DecodeSettings, Prediction, write_predictions
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.qa.metrics.by_file import FILES
from qa_deepspeed.qa.metrics.squad import Scorer
from qa_deepspeed.qa.report.page import PAGE_FILE, REPORT_FILE, now, page
from qa_deepspeed.qa.report.result import EvaluationResult, ResultBuilder, score_prediction
from qa_deepspeed.runs.evaluation_folder import METRICS_FILE
from qa_deepspeed.training.evaluation.evaluation_forward import LOSS
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import replacing, write_json, write_text
from qa_deepspeed.utils.progress import ProgressBar

EXAMPLES_AT_ONCE = 4096

Decoder = Callable[[DecodeSettings], Iterator[Prediction]]


def evaluation_options(options: RunOptions) -> RunOptions:
    """The options with those that they imply.

    Raises:
        UserError: the options contradict each other.
    """
    if options.null_score_diff_threshold == AUTO and not options.version_2_with_negative:
        raise UserError("null_score_diff_threshold auto needs unanswerable questions: pass --version_2_with_negative")
    if options.decode_mode == "exact":
        return options
    if "gather" in options.given and options.gather != "full":
        raise UserError(f"decode_mode {options.decode_mode} ranks whole rows of logits: it needs --gather full")
    for name in ("merge_duplicate_texts", "best_window_only"):
        if getattr(options, name):
            raise UserError(
                f"decode_mode {options.decode_mode} has its own rules: leave --{name} out, or use --decode_mode exact"
            )
    return dataclasses.replace(options, gather="full")


def decoder(
    candidates: Candidates, logits: FullLogits | None, store: FeatureStore, tokenizer: Any, mode: str
) -> Decoder:
    """A function from settings to predictions that may be called repeatedly.

    Args:
        logits: for the modes hf and classic.
    """
    if mode == "exact":
        return lambda settings: decode(candidates, store, settings)
    assert logits is not None, "evaluation_options sets --gather full"
    if mode == "hf":
        return lambda settings: decode_like_transformers(logits, store, settings)
    how = classic_text(tokenizer)
    return lambda settings: decode_classic(logits, store, settings, how)


def answer_and_score(
    predict: Decoder,
    store: FeatureStore,
    options: RunOptions,
    null_score_is_odds: bool,
    output_dir: Path,
    losses: np.ndarray | None,
    about: Mapping[str, str],
) -> tuple[dict[str, Any], EvaluationResult | None]:
    """Write predictions.json, nbest_predictions.json, null_odds.json (v2), metrics.json, report.json and report.html.

    Returns the metrics and the result; without any gold answer there is no result, and there are no reports.

    With null_score_diff_threshold auto the questions are decoded twice: to find the threshold of the best F1, and to
    apply it. The scores at threshold 0 are then among the metrics as untuned_exact and untuned_f1.

    Args:
        losses: of each feature, `[features]`; their means are added to the metrics.
        about: what report.html says of the model, by name (`about_evaluation`).
    """
    settings = _decode_settings(options, null_score_is_odds)
    untuned: dict[str, Any] = {}
    if options.null_score_diff_threshold == AUTO:
        found = _scores_for_threshold(predict(settings), store, options, output_dir)
        untuned = {f"untuned_{name}": found[name] for name in ("exact", "f1")}
        settings = dataclasses.replace(settings, null_score_diff_threshold=found["tuned_f1_thresh"])
    questions = len(store.examples)
    builder = ResultBuilder(
        options.version_2_with_negative,
        options.metric_language,
        questions,
        output_dir,
        store.files,
        store.file_of_examples(),
    )
    with ProgressBar("decoding and scoring", questions, "question") as bar:
        predictions = _counted(predict(settings), bar)
        observed = builder.observe(store.examples, predictions, _windows_of_examples(store))
        write_predictions(observed, output_dir, settings)
    metrics = builder.metrics() | untuned
    if losses is not None:
        _add_losses(metrics, losses, store)
    if options.version_2_with_negative:
        metrics["null_score_diff_threshold"] = settings.null_score_diff_threshold
    write_json(output_dir / METRICS_FILE, metrics)
    result = builder.result(metrics)
    if result is not None:
        data = f"{len(store.files)} files" if store.files else Path(_data_name(options)).name
        _write_report(result, output_dir, f"Evaluation on {data}", about)
    return metrics, result


def about_evaluation(options: RunOptions, command: str, model: str | None = None, steps: str = "") -> dict[str, str]:
    """What report.html says of an evaluation, by name.

    Args:
        command: "train" or "evaluate". model: None for `model_name_or_path`. steps: optimizer steps, in words.
    """
    named = {name: getattr(options, name) for name in sorted(options.given)}
    return {
        "Model": model or str(options.model_name_or_path),
        "Data": _data_name(options),
        "Date": now(),
        **({"Steps": steps} if steps else {}),
        "Command": shlex.join(["qa-deepspeed", command, *as_flags(named)]),
    }


def _data_name(options: RunOptions) -> str:
    return str(options.data_file("evaluate") or options.dataset_name)


def _add_losses(metrics: dict[str, Any], losses: np.ndarray, store: FeatureStore) -> None:
    """Add the mean loss over the features whose gold answers are known; of several files also that of each."""
    index = np.asarray(store.example_index)
    known = store.examples.has_gold()[index] if store.without_gold else np.ones(len(index), dtype=bool)
    file_of_example = store.file_of_examples()
    chosen: list[tuple[dict[str, Any], np.ndarray]] = [(metrics, known)]
    if file_of_example is not None:
        of_files = zip(store.files, range(len(store.files)), strict=True)
        chosen += [(metrics[FILES][name], known & (file_of_example[index] == number)) for name, number in of_files]
    for target, rows in chosen:
        if rows.any():
            target[LOSS] = float(losses[rows].mean(dtype=np.float64))


def _decode_settings(options: RunOptions, null_score_is_odds: bool) -> DecodeSettings:
    tuned = options.null_score_diff_threshold == AUTO
    return DecodeSettings(
        n_best_size=options.n_best_size,
        max_answer_length=options.max_answer_length,
        version_2_with_negative=options.version_2_with_negative,
        null_score_diff_threshold=0.0 if tuned else float(options.null_score_diff_threshold),
        merge_duplicate_texts=options.merge_duplicate_texts,
        null_score_is_odds=null_score_is_odds,
    )


def _scores_for_threshold(
    predictions: Iterator[Prediction], store: FeatureStore, options: RunOptions, output_dir: Path
) -> dict[str, Any]:
    """The metrics of these predictions, including the best threshold."""
    scorer = Scorer(True, options.metric_language, output_dir)
    with ProgressBar("tuning the null threshold", len(store.examples), "question") as bar:
        for example, prediction in zip(store.examples, _counted(predictions, bar), strict=True):
            score_prediction(scorer, example, prediction)
    return scorer.result()


def _counted(predictions: Iterator[Prediction], bar: ProgressBar) -> Iterator[Prediction]:
    for prediction in predictions:
        bar.advance()
        yield prediction


def _write_report(result: EvaluationResult, output_dir: Path, title: str, about: Mapping[str, str]) -> None:
    write_json(output_dir / REPORT_FILE, result.report)
    document = page(result.report, result.questions, title, about)
    write_text(output_dir / PAGE_FILE, document, errors="xmlcharrefreplace")


def _windows_of_examples(store: FeatureStore) -> Iterator[int]:
    """The number of features (windows) of each example, in order."""
    row, count = 0, len(store.examples)
    for begin in range(0, count, EXAMPLES_AT_ONCE):
        ends = np.searchsorted(store.example_index, np.arange(begin + 1, min(begin + EXAMPLES_AT_ONCE, count) + 1))
        yield from np.diff(ends, prepend=row).tolist()
        row = int(ends[-1])


def save_logits(logits: FullLogits, store: FeatureStore, path: Path) -> None:
    """Write a .npz of feature_id, example_id, start_logits and end_logits, one row per feature.

    Rows are left-aligned; positions after a row's last token hold -inf. Nothing in the file is pickled.
    """
    ids = np.array(store.examples.ids, dtype=np.str_)
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            feature_id=logits.feature_id,
            example_id=ids[store.example_index[np.asarray(logits.feature_id)]],
            start_logits=logits.start_logits,
            end_logits=logits.end_logits,
        )
