"""`qa-deepspeed audit`: what training on a file would do, before any training."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qa_deepspeed.config.run_arguments import add_run_arguments, read_run_options
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.facts import ModelFacts, model_facts
from qa_deepspeed.qa.cache.prepare import prepare_features
from qa_deepspeed.qa.data.examples import Example
from qa_deepspeed.qa.data.read_report import Rejected, commonest
from qa_deepspeed.qa.data.reading import DataSource, ReadReport, read_examples
from qa_deepspeed.qa.data.reasons import advice
from qa_deepspeed.qa.data.seen_ids import SeenIds
from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.qa.features.length_stats import histogram, measure, padding_ratio, quantiles, suggest
from qa_deepspeed.qa.features.sampler import LENGTH_MULTIPLE, epoch_order
from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.training.features import data_source, feature_settings
from qa_deepspeed.utils.errors import UserError

REJECTED_SHOWN = 10
BAR = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `audit`: the data, and what shapes its features."""
    parser.add_argument("data", metavar="DATA", nargs="+", help="files, or patterns of files, to train on")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="print N questions as they were read, answers in [brackets]"
    )
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if a question was rejected")
    add_run_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 1 with --strict if a question was rejected, else 0.

    Raises:
        UserError: the data or the model cannot be read, or nothing is usable.
    """
    run_options = read_run_options(arguments)
    if arguments.show < 0:
        raise UserError(f"--show is {arguments.show}; it must be 0 or more")
    found = audit(data_source(run_options, "train", DataSource.resolve(arguments.data)), run_options)
    if arguments.json:
        print(json.dumps(found))
    else:
        print("\n".join([*table(found), *_shown(found["examples"][: arguments.show])]))
    return 1 if arguments.strict and found["questions"]["rejected"] else 0


def audit(source: DataSource, run_options: RunOptions) -> dict[str, Any]:
    """All findings about a source, as plain values: questions, rejected ones, the usable ones as `examples`, and with a
    model answers, windows, lengths, padding, suggestion.

    The features are built as training would build them, in a temporary folder.

    Raises:
        UserError: the data or the model cannot be read, or nothing is usable.
    """
    if run_options.model_name_or_path is None:
        report = ReadReport()
        return _readings(source, run_options, read_examples(source, report), report)
    settings = feature_settings(run_options)
    if not Path(run_options.model_name_or_path).is_dir():
        for _ in read_examples(source, ReadReport()):  # faults of the data come before a download
            pass
    facts = model_facts(run_options)
    with tempfile.TemporaryDirectory(prefix="qa_deepspeed_audit_") as folder:
        store = prepare_features(source, facts.tokenizer, facts.family, settings, Path(folder))
        found = _readings(source, run_options, store.examples, store.report)
        found["questions"]["cut"] = store.counts["truncated_questions"]
        return found | _features(store, settings, run_options, facts)


def _readings(
    source: DataSource, run_options: RunOptions, examples: Iterable[Example], report: ReadReport
) -> dict[str, Any]:
    """What was read; `report` is complete when `examples` are read."""
    plain = [_as_dict(example) for example in examples]
    return {
        "files": list(source.files),
        "model": run_options.model_name_or_path,
        "questions": _questions(report) | {"repeated": _repeated_questions(plain)},
        "rejected": [one.to_dict() for one in report.rejected],
        "examples": plain,
    }


def _as_dict(example: Example) -> dict[str, Any]:
    return {
        "id": example.example_id,
        "question": example.question,
        "context": example.context,
        "answers": [{"text": answer.text, "answer_start": answer.start} for answer in example.answers],
    }


def _repeated_questions(examples: list[dict[str, Any]]) -> int:
    """Questions that stand before with the same words and context under another id."""
    seen = SeenIds()
    return sum(not seen.add(f"{one['question']}\0{one['context']}") for one in examples)


def _shown(examples: list[dict[str, Any]]) -> Iterator[str]:
    """Each question, and its context with the answers in brackets."""
    for example in examples:
        context = example["context"]
        spans = {(one["answer_start"], one["answer_start"] + len(one["text"])) for one in example["answers"]}
        for begin, end in sorted(spans, reverse=True):
            context = f"{context[:begin]}[{context[begin:end]}]{context[end:]}"
        yield from ("", f"{example['id']}: {example['question']}", f"  {context}")
        if not spans:
            yield "  (no answer)"


def _features(
    store: FeatureStore, settings: FeatureSettings, run_options: RunOptions, facts: ModelFacts
) -> dict[str, Any]:
    """What the features of a model show."""
    sizes = measure(store, settings)
    special_tokens = store.special_tokens
    batch = run_options.per_gpu_train_batch_size
    batches = epoch_order(store.lengths, batch, run_options.seed, 0)
    tokens = int(store.lengths.sum())
    return {
        "settings": dataclasses.asdict(settings) | {"max_answer_length": run_options.max_answer_length},
        "answers": {
            "longest": int(sizes.answer.max(initial=0)),
            "longer_than_max_answer_length": int((sizes.answer > run_options.max_answer_length).sum()),
            "in_no_window": store.counts["answers_in_no_window"],
        },
        "windows": {
            "total": len(store),
            "per_question": len(store) / len(sizes.windows),
            "most": int(sizes.windows.max(initial=0)),
            "questions_with_one": int((sizes.windows == 1).sum()),
            "without_their_answer": store.counts["windows_without_answer"],
            "tokens": tokens,
        },
        "lengths": quantiles(sizes.whole) | {"histogram": histogram(sizes.whole)},
        "padding": {
            "rows_of_a_batch": batch,
            "to_the_longest_of_the_batch": padding_ratio(store.lengths, batches, LENGTH_MULTIPLE),
            "to_max_seq_length": 1 - tokens / (len(store) * settings.max_seq_length) if len(store) else 0.0,
        },
        "suggestion": suggest(sizes, special_tokens, settings.max_query_length, _longest_row(facts)),
    }


def _questions(report: ReadReport) -> dict[str, Any]:
    return {
        "usable": report.usable,
        "repaired": report.repaired,
        "unanswerable": report.unanswerable,
        "rejected": len(report.rejected),
        "rejected_by_reason": report.rejected_by_reason,
        "answer_faults": report.answer_faults,
        "ids_made": report.ids_made,
        "notes": report.notes,
    }


def _longest_row(facts: ModelFacts) -> int | None:
    """The most tokens the model takes; its tokenizer often knows better than the number of its positions."""
    said = (facts.tokenizer.model_max_length, getattr(facts.config, "max_position_embeddings", None))
    # Tokenizers that know no limit say 10^30.
    limits = [int(limit) for limit in said if isinstance(limit, (int, float)) and 0 < limit < 10**9]
    return min(limits, default=None)


def table(found: dict[str, Any]) -> list[str]:
    """The findings as lines for people."""
    questions, model = found["questions"], found["model"]
    lines = [", ".join(found["files"]) + (f" for {model}" if model else ""), *questions["notes"], ""]
    cut = []
    if model:
        cut = [("  cut", questions["cut"], f"longer than max_query_length {found['settings']['max_query_length']}")]
    lines += _rows(
        "questions",
        [
            ("usable", questions["usable"], ""),
            ("  repaired", questions["repaired"], "answer moved to where it stands"),
            ("  unanswerable", questions["unanswerable"], f"{questions['unanswerable'] / questions['usable']:.1%}"),
            ("  repeated", questions["repeated"], "same question and context under another id"),
            *cut,
            ("  without an id", questions["ids_made"], "got one: a digest of question and context"),
            ("rejected", questions["rejected"], ""),
            *_with_advice("  ", questions["rejected_by_reason"]),
            *_with_advice("answers: ", questions["answer_faults"]),
        ],
    )
    lines += _feature_lines(found) if model else ["with --model_name_or_path also lengths, windows and padding"]
    for one in found["rejected"][:REJECTED_SHOWN]:
        lines.append(f"rejected: id {one['example_id']}: {Rejected(**one)}")
    if len(found["rejected"]) > REJECTED_SHOWN:
        lines.append(f"... and {len(found['rejected']) - REJECTED_SHOWN:,} more, all with --json")
    return lines


def _feature_lines(found: dict[str, Any]) -> list[str]:
    """Answers, windows and lengths in tokens."""
    answers, windows, padding = (found[name] for name in ("answers", "windows", "padding"))
    settings, suggestion = found["settings"], found["suggestion"]
    lines = _rows(
        "answers (tokens)",
        [
            ("longest", answers["longest"], ""),
            (
                "too long",
                answers["longer_than_max_answer_length"],
                f"never predicted: over max_answer_length {settings['max_answer_length']}",
            ),
            ("in no window", answers["in_no_window"], "never learned: no window holds the whole answer"),
        ],
    )
    stride = f"doc_stride {settings['doc_stride']} ({settings['doc_stride_is']})"
    lines += _rows(
        f"windows (max_seq_length {settings['max_seq_length']}, {stride})",
        [
            ("windows", windows["total"], f"{windows['per_question']:.2f} per question, at most {windows['most']}"),
            ("questions with one", windows["questions_with_one"], ""),
            ("without their answer", windows["without_their_answer"], "labelled as no answer"),
            ("tokens", windows["tokens"], ""),
            (
                "padding",
                f"{padding['to_the_longest_of_the_batch']:.1%}",
                f"of padded batches of {padding['rows_of_a_batch']} rows of similar length, none of packed ones; "
                f"{padding['to_max_seq_length']:.1%} if every row were padded to max_seq_length",
            ),
        ],
    )
    lines += _length_lines(found["lengths"])
    if suggestion:
        lines += [
            "",
            f"suggested: --max_seq_length {suggestion['max_seq_length']} --doc_stride {suggestion['doc_stride']} "
            f"--doc_stride_is step   ({suggestion['windows']:,} windows, {suggestion['tokens']:,} tokens)",
        ]
    return lines


def _with_advice(prefix: str, counts: dict[str, int]) -> list[tuple[str, int, str]]:
    """A row for each reason, the commonest first."""
    return [(f"{prefix}{reason}", counts[reason], advice(reason)) for reason in commonest(counts)]


def _rows(title: str, rows: list[tuple[str, Any, str]]) -> list[str]:
    width = max(28, *(len(name) for name, _, _ in rows))
    shown = [(name, value if isinstance(value, str) else f"{value:,}", note) for name, value, note in rows]
    return [title, *(f"  {name:<{width}} {value:>12}  {note}".rstrip() for name, value, note in shown), ""]


def _length_lines(lengths: dict[str, Any]) -> list[str]:
    shares = ", ".join(f"{name} {value:,}" for name, value in lengths.items() if name != "histogram")
    lines = [f"tokens of a question with its whole context: {shares}"]
    most = max((one["questions"] for one in lengths["histogram"]), default=0)
    for one in lengths["histogram"]:
        name = f"{one['above'] + 1}-{one['to']}" if one["to"] else f"over {one['above']}"
        bar = "#" * int(np.ceil(BAR * one["questions"] / most))
        lines.append(f"  {name:>10} {one['questions']:>9,}  {bar}".rstrip())
    return lines
