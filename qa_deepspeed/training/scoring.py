"""Rank 0's part of an evaluation: from what was gathered to answers, scores and files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qa_deepspeed.config.run_options import AUTO, RunOptions
from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.decoding.classic import classic_text, decode_classic
from qa_deepspeed.qa.decoding.exact import Candidates, decode
from qa_deepspeed.qa.decoding.full_logits import FullLogits
from qa_deepspeed.qa.decoding.hf import decode_like_transformers
from qa_deepspeed.qa.decoding.predictions import DecodeSettings, Prediction, write_predictions
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.qa.metrics.squad import Gold, Scorer
from qa_deepspeed.qa.report.analysis import Analysis
from qa_deepspeed.qa.report.page import PAGE_FILE, REPORT_FILE, page
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import write_json, write_text
from qa_deepspeed.utils.progress import ProgressBar

EXAMPLES_AT_ONCE = 4096

Decoder = Callable[[DecodeSettings], Iterator[Prediction]]


def evaluation_options(options: RunOptions) -> RunOptions:
    """The options with what they imply.

    Raises:
        UserError: they contradict each other.
    """
    if options.null_score_diff_threshold == AUTO and not options.version_2_with_negative:
        raise UserError(
            "null_score_diff_threshold auto weighs answers against no answer: it needs --version_2_with_negative"
        )
    if options.decode_mode == "exact":
        return options
    if "gather" in options.given and options.gather != "full":
        raise UserError(f"decode_mode {options.decode_mode} ranks whole rows of logits: it needs --gather full")
    for name in ("merge_duplicate_texts", "best_window_only"):
        if getattr(options, name):
            raise UserError(f"decode_mode {options.decode_mode} has its own rules: leave --{name} out, or decode exact")
    return dataclasses.replace(options, gather="full")


def decoder(
    candidates: Candidates, logits: FullLogits | None, store: FeatureStore, tokenizer: Any, mode: str
) -> Decoder:
    """The way from settings to predictions; it can be gone several times. `logits` is for the modes hf and classic."""
    if mode == "exact":
        return lambda settings: decode(candidates, store, settings)
    assert logits is not None, "evaluation_options has asked for whole rows"
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
    further: Mapping[str, Any],
) -> dict[str, Any]:
    """Write predictions.json, nbest_predictions.json, null_odds.json (v2), metrics.json, report.json and report.html;
    the metrics, among them those of `further`, which do not come of the answers.

    With null_score_diff_threshold auto the questions are answered twice: to find the threshold of best F1, and to use
    it. What the threshold 0 gives is then told as untuned_exact and untuned_f1.
    """
    settings = DecodeSettings(
        n_best_size=options.n_best_size,
        max_answer_length=options.max_answer_length,
        version_2_with_negative=options.version_2_with_negative,
        null_score_diff_threshold=0.0
        if options.null_score_diff_threshold == AUTO
        else float(options.null_score_diff_threshold),
        merge_duplicate_texts=options.merge_duplicate_texts,
        null_score_is_odds=null_score_is_odds,
    )
    untuned: dict[str, Any] = {}
    if options.null_score_diff_threshold == AUTO:
        first = Scorer(True, options.metric_language, output_dir)
        with ProgressBar("looking for the threshold", len(store.examples), "question") as bar:
            for example, prediction in zip(store.examples, predict(settings), strict=True):
                _score(first, example, prediction)
                bar.advance()
        found = first.result()
        untuned = {f"untuned_{name}": found[name] for name in ("exact", "f1")}
        settings = dataclasses.replace(settings, null_score_diff_threshold=found["tuned_f1_thresh"])
    scorer = Scorer(options.version_2_with_negative, options.metric_language, output_dir)
    analysis = Analysis(options.version_2_with_negative, options.metric_language, output_dir)
    write_predictions(_observed(predict(settings), store, scorer, analysis), output_dir, settings)
    metrics = scorer.result() | untuned | dict(further)
    if options.version_2_with_negative:
        metrics["null_score_diff_threshold"] = settings.null_score_diff_threshold
    write_json(output_dir / "metrics.json", metrics)
    report = {"metrics": metrics, **analysis.report(scorer.records())}
    write_json(output_dir / REPORT_FILE, report)
    title = f"Evaluation on {options.data_file('evaluate') or options.dataset_name}"
    write_text(output_dir / PAGE_FILE, page(report, title), errors="xmlcharrefreplace")
    return metrics


def _observed(
    predictions: Iterator[Prediction], store: FeatureStore, scorer: Scorer, analysis: Analysis
) -> Iterator[Prediction]:
    """Pass the predictions through; scorer and analysis take in each."""
    windows = _windows_of_examples(store)
    with ProgressBar("decoding and scoring", len(store.examples), "question") as bar:
        for example, prediction in zip(store.examples, predictions, strict=True):
            analysis.add(example, prediction, next(windows), *_score(scorer, example, prediction))
            bar.advance()
            yield prediction


def _score(scorer: Scorer, example: Example, prediction: Prediction) -> tuple[int, float]:
    assert prediction.example_id == example.example_id, "predictions and examples are in different orders"
    gold = Gold(example.example_id, tuple(answer.text for answer in example.answers))
    return scorer.add(gold, prediction.text, prediction.null_odds, prediction.best_span_text)


def _windows_of_examples(store: FeatureStore) -> Iterator[int]:
    """The number of features of each example, in order."""
    row = 0
    for begin in range(0, len(store.examples), EXAMPLES_AT_ONCE):
        ends = np.searchsorted(store.example_index, np.arange(begin + 1, begin + EXAMPLES_AT_ONCE + 1))
        yield from np.diff(ends, prepend=row).tolist()
        row = int(ends[-1])


def save_logits(logits: FullLogits, store: FeatureStore, path: Path) -> None:
    """Write a .npz of feature_id, example_id, start_logits and end_logits, one row a feature.

    Rows are aligned to the left; places after a row's last token hold -inf. Nothing in the file is pickled.
    """
    ids = np.array(store.examples.ids, dtype=np.str_)
    partial = path.with_name(f".{path.name}")
    with open(partial, "wb") as file:
        np.savez(
            file,
            feature_id=logits.feature_id,
            example_id=ids[store.example_index[np.asarray(logits.feature_id)]],
            start_logits=logits.start_logits,
            end_logits=logits.end_logits,
        )
    partial.replace(path)
