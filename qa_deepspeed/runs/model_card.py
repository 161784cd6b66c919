"""The model card: README.md of a saved model, with the metadata header that the hub reads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from qa_deepspeed.config.option_groups import AUTO
from qa_deepspeed.config.options import as_flags
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.qa.metrics.by_file import FILES
from qa_deepspeed.utils.files import write_text
from qa_deepspeed.utils.json_files import ANYTHING, DamagedFile, read_json
from qa_deepspeed.utils.units import plural

CARD_FILE = "README.md"
TASK = "question-answering"

EARLIER_CARDS_MARK = "<!-- written by qa_deepspeed: it is written anew by the next training into this folder -->"
"""Marks a generated card; the text is that of earlier versions, so that their cards are recognised too."""

SAYS_NOTHING = re.compile(
    r"(best|final|last|latest|models?|checkpoint|ckpt|runs?|outputs?|out|results?|train|training|dev|eval|evaluation"
    r"|valid|validation|test|data|datasets?|[*?]+)([-_.]?(v?\d[\d.]*|[*?]+))*"
)
"""Names of files and folders, without suffix, that do not tell what is in them."""

NOT_REPEATED = {
    "cache_dir",
    "data_dir",
    "dry_run",
    "local_rank",
    "output_dir",
    "overwrite_cache",
    "overwrite_output_dir",
    "predict_file",
    "push_to_hub",
    "resume_from_checkpoint",
    "resume_with_changes",
    "server_ip",
    "server_port",
    "threads",
    "train_file",
}
"""Options that the card's command leaves out: folders of the machine, what has no effect, what a repetition must not
do; files of data are added by their local names."""

NAMES_OR_PATHS = (
    "config_name",
    "dataset_name",
    "deepspeed_config",
    "model_name_or_path",
    "nvme_path",
    "teacher_model_name_or_path",
    "tokenizer_name",
)
"""Options that are a path of this machine or a name that is known everywhere."""


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
    write_text(path, model_card(name, options, record, intervals))
    return True


def model_card(
    name: str, options: RunOptions, record: Mapping[str, Any], intervals: Mapping[str, Sequence[float]]
) -> str:
    """The text of the card of the model that is loaded by `name`.

    It shows no path of this machine: local models and data appear by their `local_name`.
    """
    title = name.split("/")[-1]
    parts = [
        f"---\n{_header(title, options, record).to_yaml()}\n---\n{EARLIER_CARDS_MARK}\n\n# {title}",
        _purpose(options),
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


def local_name(path: str) -> str:
    """The last component of a path, after its folder where it does not tell what is in it: `squad/train.json`,
    `bert-large/checkpoint-500`.
    """
    given = Path(path).expanduser()
    if given.name in ("", ".."):
        given = given.resolve()
    if not SAYS_NOTHING.fullmatch(re.sub(r"(\.[A-Za-z]\w*)+$", "", given.name)):
        return given.name
    folder = given.parent
    known = folder.name not in ("", "..") and folder != Path.home()  # the home folder's name is the user's
    return f"{folder.name}/{given.name}" if known else given.name


def _data_name(options: RunOptions, purpose: str) -> str | None:
    """The files of `purpose` ("train" or "evaluate") by their local names, with commas between, or the data set."""
    files = options.data_file(purpose)
    if not files:
        return _name_or_local(options.dataset_name)
    weights = options.weighted_patterns(purpose)
    return ",".join(local_name(name) + (f"={weight:g}" if weight != 1 else "") for name, weight in weights.items())


def _name_or_local(value: str | None) -> str | None:
    return local_name(value) if value and Path(value).expanduser().exists() else value


def _names_or_local(value: str | None) -> str | None:
    """`_name_or_local` of each of several names with commas between."""
    if value is None or Path(value).expanduser().exists():
        return _name_or_local(value)
    return ",".join(str(_name_or_local(part.strip())) for part in value.split(","))


def _evaluated_on(options: RunOptions) -> str:
    return _data_name(options, "evaluate") or ""


def _base(path: str) -> str:
    """A local base model in words: its name, and its architecture and size where config.json has them."""
    try:
        config = read_json(Path(path).expanduser() / "config.json", {str: ANYTHING}) or {}
    except DamagedFile:
        config = {}
    kind, layers, width = (config.get(name) for name in ("model_type", "num_hidden_layers", "hidden_size"))
    details = [str(kind)] * bool(kind) + [f"{layers} layers of width {width}"] * bool(layers and width)
    return f"the local checkpoint `{local_name(path)}`" + (f" ({', '.join(details)})" if details else "")


def _purpose(options: RunOptions) -> str:
    given = options.model_name_or_path or ""
    base = _public_name(given) or _base(given)
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
    files = [f"| {name} | {one['exact']:.2f} | {one['f1']:.2f} | {one['total']:,} |" for name, one in _scored(metrics)]
    if files:
        mean = f"| mean of the files | {metrics['macro_exact']:.2f} | {metrics['macro_f1']:.2f} | |"
        lines += ["", "| file | exact match | F1 | questions |", "|---|---|---|---|", *files, mean]
    return (
        f"## Evaluation\n\n{metrics['total']:,} questions of {_evaluated_on(options)}, by the official rules of SQuAD "
        f"{'v2.0' if options.version_2_with_negative else 'v1.1'}; the intervals are bootstrapped over paragraphs.\n\n"
        + "\n".join(lines)
    )


def _scored(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The name and the metrics of each of several files of which a question was scored."""
    return [(name.replace("|", "\\|"), values) for name, values in metrics.get(FILES, {}).items() if values["total"]]


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
        f"data: {_data_name(options, 'train')}",
        (f"{taken:,} of " if taken < usable else "")
        + f"{plural(usable, 'usable question')}"
        + (f", {sum(questions['rejected'].values()):,} left out" if questions.get("rejected") else ""),
        f"{plural(identity['steps'], 'step')} of {identity['global_batch_size']} rows, {identity['precision']}",
        f"{plural(hardware['ranks'], 'rank')}; {device}",
        f"training {record['seconds'].get('training', 0):,.0f} s",
        ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "deepspeed") if name in versions),
    ]
    listed = "\n".join(f"- {fact}" for fact in facts)
    command = training_command(options, record)
    return f"## Training\n\n{listed}\n\nPaths in the command are relative.\n\n```bash\n{command}\n```"


def training_command(options: RunOptions, record: Mapping[str, Any]) -> str:
    """The command line that repeats the training, on as many ranks: the options that were given, with local models and
    data by their local names, which are relative paths.

    Args:
        record: `hardware` (ranks) and `data` (whether there was an evaluation) count.
    """
    values = {name: getattr(options, name) for name in options.given - NOT_REPEATED}
    values |= {name: _names_or_local(values[name]) for name in NAMES_OR_PATHS if name in values}
    for option, purpose in (("train_file", "train"), ("predict_file", "evaluate")):
        in_data_dir = options.data_dir and purpose in (record.get("data") or {})
        if options.data_file(purpose) and (option in options.given or in_data_dir):
            values[option] = _data_name(options, purpose)
    flags = as_flags({name: values[name] for name in sorted(values)})
    return shlex.join([*_launcher(record["hardware"]), *flags, "--output_dir", "OUTPUT_DIR"])


def _launcher(hardware: Mapping[str, Any]) -> list[str]:
    """The words before the options: one process, the ranks of one node, or the hosts of a hostfile."""
    ranks, of_a_node = hardware["ranks"], hardware.get("ranks_per_node", hardware["ranks"])
    if ranks == 1:
        return ["qa-deepspeed", "train"]
    where = ["--num_accelerators", str(ranks)] if ranks == of_a_node else ["--hostfile", "HOSTFILE"]
    return ["deepspeed", "--quiet", *where, "--module", "qa_deepspeed", "train"]
