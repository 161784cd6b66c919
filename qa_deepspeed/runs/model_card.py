"""The model card: README.md of a saved model, with the metadata header that the hub reads."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from qa_deepspeed.config.option_groups import AUTO
from qa_deepspeed.config.run_options import RunOptions

CARD_FILE = "README.md"
TASK = "question-answering"

EARLIER_CARDS_MARK = "<!-- written by qa_deepspeed: it is written anew by the next training into this folder -->"
"""Marks a generated card; the text is that of earlier versions, so that their cards are recognised too."""


def write_model_card(
    folder: Path, options: RunOptions, record: Mapping[str, Any], intervals: Mapping[str, Sequence[float]]
) -> bool:
    """Write the card of the model in `folder`, unless it has a card without the mark; returns whether it was written.

    Args:
        record: the content of run.json (metrics, data, software, hardware, identity, seconds).
        intervals: low and high end of the 95% intervals of exact and f1 in percent; empty if nothing was evaluated.
    """
    path = folder / CARD_FILE
    if path.is_file() and EARLIER_CARDS_MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    name = options.push_to_hub or folder.resolve().name
    path.write_text(model_card(name, options, record, intervals), encoding="utf-8")
    return True


def model_card(
    name: str, options: RunOptions, record: Mapping[str, Any], intervals: Mapping[str, Sequence[float]]
) -> str:
    """The text of the card of the model that is loaded by `name`.

    It names no folder of this machine: local models and data appear by their base name or not at all.
    """
    title = name.split("/")[-1]
    parts = [
        f"---\n{_header(title, options, record).to_yaml()}\n---\n{EARLIER_CARDS_MARK}\n\n# {title}",
        _purpose(options, record),
        _loading(name, options, record),
        _evaluation(options, record, intervals),
        _training(options, record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(name: str, options: RunOptions, record: Mapping[str, Any]) -> ModelCardData:
    metrics = record.get("metrics") or {}
    return ModelCardData(
        library_name="peft" if options.lora_rank is not None else "transformers",
        pipeline_tag=TASK,
        tags=[TASK, "extractive-qa", "deepspeed", "qa_deepspeed"],
        base_model=_public_name(options.model_name_or_path),
        datasets=[options.dataset_name] if options.dataset_name else None,
        model_name=name,
        eval_results=_eval_results(options, metrics) if metrics else None,
    )


def _eval_results(options: RunOptions, metrics: Mapping[str, Any]) -> list[EvalResult]:
    evaluated_on = _evaluated_on(options)
    return [
        EvalResult(
            task_type=TASK,
            task_name="Question Answering",
            dataset_type=options.dataset_name or evaluated_on,
            dataset_name=evaluated_on,
            dataset_split=None if options.data_file("evaluate") else options.predict_split,
            metric_type=metric_type,
            metric_name=metric_name,
            metric_value=round(float(metrics[key]), 3),
        )
        for key, metric_type, metric_name in (("exact", "exact_match", "Exact Match"), ("f1", "f1", "F1"))
    ]


def _public_name(name: str | None) -> str | None:
    """The hub's name of a model, or None for a local folder."""
    if not name or Path(name).exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        return None
    return name


def _evaluated_on(options: RunOptions) -> str:
    return Path(options.data_file("evaluate") or options.dataset_name or "").name


def _purpose(options: RunOptions, record: Mapping[str, Any]) -> str:
    local = Path(options.model_name_or_path or "").name
    base = _public_name(options.model_name_or_path) or f"a checkpoint named {local}"
    none = (
        " It also says when the text does not answer the question."
        if options.version_2_with_negative
        else " It was trained on answerable questions only and always finds something."
    )
    return (
        "Answers a question by a span of a given text (extractive question answering). Fine-tuned from "
        f"{base}.{none}\n\n## Intended use\n\n"
        "Finding the passage of a document that answers a question, in the language and the kind of text it was "
        "trained on. An answer is a quotation: it is as true as the text. It is not meant for decisions about people "
        "without someone who reads the passage, nor for texts far from its training data, on which its scores say "
        "nothing."
    )


def _loading(name: str, options: RunOptions, record: Mapping[str, Any]) -> str:
    lengths = f"max_seq_len={options.max_seq_length}, max_answer_len={options.max_answer_length}"
    tuned = options.null_score_diff_threshold == AUTO  # only then does the model's config hold it
    threshold = (record.get("metrics") or {}).get("null_score_diff_threshold") if tuned else None
    threshold_note = (
        ""
        if threshold is None
        else f'\n\nNo answer (`""`) is given where the null odds exceed {threshold:.4g}, the threshold of the '
        "evaluation below."
    )
    bare = f'transformers.AutoModelForQuestionAnswering.from_pretrained("{name}")'
    if options.lora_rank is not None:
        bare = f'peft.AutoPeftModel.from_pretrained("{name}")'
    return (
        "## How to load it\n\n"
        "```python\n"
        "from qa_deepspeed import QuestionAnswerer\n\n"
        f'answerer = QuestionAnswerer.from_pretrained("{name}")\n'
        f'answerer(question="...", context="...", {lengths})\n'
        "```\n\n"
        f"or the bare model: `{bare}`.{threshold_note}"
    )


def _evaluation(options: RunOptions, record: Mapping[str, Any], intervals: Mapping[str, Sequence[float]]) -> str:
    metrics = record.get("metrics") or {}
    if not metrics:
        return "## Evaluation\n\nNot evaluated."
    rows = [
        ("exact", "exact match"),
        ("f1", "F1"),
        ("HasAns_f1", "F1 of answerable questions"),
        ("NoAns_f1", "F1 of unanswerable questions"),
        ("best_f1", "F1 at the best threshold"),
    ]
    lines = ["| | score | 95% interval |", "|---|---|---|"]
    for key, shown in rows:
        if key in metrics:
            interval = "{:.2f} to {:.2f}".format(*intervals[key]) if key in intervals else ""
            lines.append(f"| {shown} | {metrics[key]:.2f} | {interval} |")
    return (
        f"## Evaluation\n\n{metrics['total']:,} questions of {_evaluated_on(options)}, by the official rules of SQuAD "
        f"{'v2.0' if options.version_2_with_negative else 'v1.1'}; the intervals are bootstrapped over paragraphs.\n\n"
        + "\n".join(lines)
    )


def _training(options: RunOptions, record: Mapping[str, Any]) -> str:
    data = (record.get("data") or {}).get("train", {})
    questions = data.get("questions", {})
    versions = record["software"]["versions"]
    hardware = record["hardware"]
    gpus = hardware["gpus"]
    device = f"{len(gpus)} x {gpus[0]} a node" if gpus else f"{hardware['processor']}, {hardware['cores']} cores a node"
    identity = record["identity"]
    usable = questions.get("usable", 0)
    taken = data.get("features", {}).get("examples", usable)
    facts = [
        (f"{taken:,} of " if taken < usable else "")
        + f"{usable:,} usable questions"
        + (f", {sum(questions['rejected'].values()):,} left out" if questions.get("rejected") else ""),
        f"{identity['steps']:,} steps of {identity['global_batch_size']} rows, {identity['precision']}",
        f"{hardware['ranks']} ranks; {device}",
        f"training {record['seconds'].get('training', 0):,.0f} s",
        ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "deepspeed") if name in versions),
    ]
    listed = "\n".join(f"- {fact}" for fact in facts)
    return f"## Training\n\n{listed}\n\n```bash\n{training_command(options)}\n```"


def training_command(options: RunOptions) -> str:
    """The command line that repeats the training: the options that were given, without folders for output and cache."""
    words = ["qa-deepspeed", "train"]
    for name in sorted(options.given - {"local_rank", "output_dir", "overwrite_output_dir", "cache_dir"}):
        value = getattr(options, name)
        if name in ("train_file", "predict_file", "model_name_or_path") and Path(str(value)).exists():
            value = Path(str(value)).name
        words += [f"--{name}", str(value)]
    return shlex.join([*words, "--output_dir", "OUTPUT_DIR"])
