"""What a run is asked to do: every option of `train` and `evaluate`, and the numbers derived from them."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Any

from qa_deepspeed.config.options import option
from qa_deepspeed.qa.metrics.normalization import METRIC_LANGUAGES
from qa_deepspeed.utils.errors import UserError

TRAIN = "train"

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "constant",
    "constant_with_warmup",
)
"""The learning-rate schedules on offer: those of transformers.get_scheduler that need nothing but steps."""
AUTO = "auto"


@dataclass(frozen=True)
class RunOptions:
    """The options of one run; the flags of the classic run_squad.py with their defaults, and what DeepSpeed adds."""

    # what to read and where to write
    model_type: str | None = option(None, "family of the model; may be left out, must not contradict the checkpoint")
    model_name_or_path: str | None = option(None, "checkpoint folder or hub name to start from")
    config_name: str | None = option(None, "model config folder or name, if not the model's own")
    tokenizer_name: str | None = option(None, "tokenizer folder or name, if not the model's own")
    qa_head: str | None = option(
        None,
        "span: a start and an end logit for each token; beam: ends that depend on the "
        "start and a score for no answer (XLNet, XLM). Left out, the checkpoint's own, or "
        "span",
        choices=("span", "beam"),
    )
    cache_dir: str | None = option(
        None,
        "folder for caches, hub files in hub/ and features in features/; unset:"
        " Hugging Face's own place, and a folder beside the data, or ~/.cache",
    )
    output_dir: str | None = option(None, "folder for the model, checkpoints, predictions and TensorBoard")
    data_dir: str | None = option(
        None,
        "folder that train_file and predict_file are in; where these are not given, "
        "they are train-v1.1.json and dev-v1.1.json (v2.0 with version_2_with_negative)",
    )
    train_file: str | None = option(
        None,
        "training questions, SQuAD JSON or rows as JSON, JSON lines, CSV or Parquet; "
        ".gz of these; several with commas between, or a glob",
        only=TRAIN,
    )
    predict_file: str | None = option(None, "questions to evaluate on, in the same formats")
    dataset_name: str | None = option(None, "data set of the hub, where train_file or predict_file is not given")
    dataset_config: str | None = option(None, "configuration of dataset_name")
    train_split: str = option("train", "split of dataset_name to train on", only=TRAIN)
    predict_split: str = option("validation", "split of dataset_name to evaluate on")
    id_column: str = option("id", "column of rows that holds the question's id")
    question_column: str = option("question", "column of rows that holds the question")
    context_column: str = option("context", "column of rows that holds the context")
    answers_column: str = option("answers", "column of rows that holds the answers (text and answer_start)")
    is_impossible_column: str = option("is_impossible", "column of rows that says whether there is no answer")
    overwrite_output_dir: bool = option(False, "start afresh in an output_dir that holds another run", only=TRAIN)
    overwrite_cache: bool = option(False, "build the features again even if the cache has them")
    # the questions
    version_2_with_negative: bool = option(False, "some questions have no answer (SQuAD v2.0)")
    null_score_diff_threshold: float | str = option(
        0.0,
        "answer nothing where null odds exceed this; auto: the threshold of best F1 on predict_file, kept in the "
        "saved model's config; left out, evaluate takes the model's own, if it has one",
        words=(AUTO,),
    )
    max_seq_length: int = option(384, "longest row (question and window of the context), in tokens")
    doc_stride: int = option(
        128,
        "tokens from the start of one window of a long context to the start of the next; "
        "with doc_stride_is overlap, the tokens that neighbouring windows share",
    )
    doc_stride_is: str = option(
        "step",
        "meaning of doc_stride: step (as run_squad.py) or overlap (as run_qa.py and tokenizers)",
        choices=("step", "overlap"),
    )
    max_query_length: int = option(64, "longest question, in tokens; the rest is cut off and counted")
    windows_without_answer: str = option(
        "keep",
        "windows that miss the answer of their question, in training without "
        "unanswerable questions: keep, drop, or sample one of a question",
        choices=("keep", "drop", "sample"),
        only=TRAIN,
    )
    answers: str = option(
        "first",
        "gold answers of a question to learn from: its first, or all annotators' (which the marginal objective uses)",
        choices=("first", "all"),
        only=TRAIN,
    )
    max_train_examples: int | None = option(None, "train on this many questions, drawn at random by seed", only=TRAIN)
    max_eval_examples: int | None = option(None, "evaluate on the first so many questions")
    do_lower_case: bool = option(False, "lower-case the text; left out, the tokenizer does as it was saved")
    lang_id: int = option(0, "language id of the text, for multilingual XLM models")
    # what to do
    do_train: bool = option(True, "train; false with do_eval: only evaluate", only=TRAIN)
    dry_run: bool = option(
        False, "only say whether the run would start and what it would do, as qa-deepspeed check", only=TRAIN
    )
    do_eval: bool = option(False, "evaluate at the end", only=TRAIN)
    evaluate_during_training: bool = option(False, "evaluate also every logging_steps", only=TRAIN)
    eval_all_checkpoints: bool = option(False, "evaluate every checkpoint in output_dir, not only the final model")
    resume_from_checkpoint: str = option(
        "auto",
        "auto: go on from the newest checkpoint of this run in output_dir, if "
        "there is one; never; or a checkpoint folder",
        only=TRAIN,
    )
    resume_with_changes: str | None = option(
        None, "go on although these settings differ, like learning_rate,seed; names with commas between", only=TRAIN
    )
    # batches and optimization
    per_gpu_train_batch_size: int = option(8, "rows of one micro-batch on one rank", only=TRAIN)
    per_gpu_eval_batch_size: int = option(8, "rows of one evaluation micro-batch on one rank")
    gradient_accumulation_steps: int = option(1, "micro-batches per optimizer step", only=TRAIN)
    global_batch_size: int | None = option(
        None, "rows of one optimizer step over all ranks; accumulation follows from it", only=TRAIN
    )
    max_tokens_per_batch: int | None = option(
        None,
        "padded tokens of one micro-batch on one rank, at most: steps of "
        "long rows are cut into more micro-batches, of short ones into fewer; "
        "the rows of a step stay the same",
        only=TRAIN,
    )
    objective: str = option(
        "mean",
        "loss of a row: mean of the start's and the end's cross-entropy, or marginal, over "
        "all gold spans of the row (needs answers all)",
        choices=("mean", "marginal"),
        only=TRAIN,
    )
    label_smoothing: float = option(0.0, "share of the target that is spread over all possible positions", only=TRAIN)
    learning_rate: float = option(5e-5, "highest learning rate", only=TRAIN)
    lr_scheduler_type: str = option(
        "linear",
        "learning rate after the warm-up: linear or cosine decay to 0, ... as transformers.get_scheduler",
        choices=SCHEDULES,
        only=TRAIN,
    )
    weight_decay: float = option(0.0, "decoupled weight decay (none on biases and norms)", only=TRAIN)
    adam_epsilon: float = option(1e-8, "epsilon of Adam", only=TRAIN)
    max_grad_norm: float = option(1.0, "clip gradients to this norm; 0 for no clipping", only=TRAIN)
    num_train_epochs: float = option(3.0, "passes over the training rows", only=TRAIN)
    max_steps: int = option(-1, "optimizer steps; if positive, num_train_epochs does not count", only=TRAIN)
    warmup_steps: int = option(0, "optimizer steps of linear warm-up", only=TRAIN)
    seed: int = option(42, "seed of everything random")
    # LoRA
    lora_rank: int | None = option(
        None,
        "train adapters of this rank and the head, all else frozen (needs peft); what is saved is the adapter",
        only=TRAIN,
    )
    lora_alpha: int = option(16, "adapters count lora_alpha / lora_rank times", only=TRAIN)
    lora_dropout: float = option(0.0, "dropout before the adapters", only=TRAIN)
    lora_target_modules: str = option(
        "all-linear", "modules that get adapters, like query,value; or all linear ones but the head's", only=TRAIN
    )
    # decoding
    n_best_size: int = option(20, "answers kept for each question")
    max_answer_length: int = option(30, "longest answer, in tokens")
    decode_mode: str = option(
        "exact",
        "exact: the best of all spans; hf: as Transformers' question-answering example; "
        "classic: as run_squad.py, answer for answer. The last two rank whole rows and imply "
        "--gather full",
        choices=("exact", "hf", "classic"),
    )
    gather: str = option(
        "candidates",
        "what rank 0 gets of each row: its best spans, or full: all its logits, which are saved as logits.npz",
        choices=("candidates", "full"),
    )
    best_window_only: bool = option(
        False,
        "count a span only in the window that gives its start most context, as "
        "run_squad.py does (decode_mode classic always does)",
    )
    merge_duplicate_texts: bool = option(False, "of several spans with the same text, keep the best only")
    metric_language: str = option(
        "en",
        "normalisation and word cutting of the metrics: en is the official one; zh, ja and th count characters",
        choices=METRIC_LANGUAGES,
    )
    # how it runs
    deepspeed_config: str | None = option(
        None,
        "a shipped config by name (zero0 ... zero3, zero3_offload; "
        "the README has all) or a path to a DeepSpeed JSON file",
    )
    nvme_path: str | None = option(None, "folder on a local NVMe disk of each node, for zero3_nvme", only=TRAIN)
    gradient_checkpointing: bool = option(
        False,
        "keep each layer's input only and compute the rest again in the backward pass: less memory, a third more work",
        only=TRAIN,
    )
    attn_implementation: str | None = option(
        None,
        "attention of Transformers: eager, sdpa, flash_attention_2, flash_attention_3; unset: the fastest that is here",
    )
    bf16: bool = option(False, "train and evaluate in bfloat16")
    fp16: bool = option(False, "train and evaluate in float16 with loss scaling (GPU only)")
    no_cuda: bool = option(False, "run on the CPU even if there is a GPU")
    timeout: int = option(600, "seconds after which a rank that hangs is given up")
    logging_steps: int = option(500, "optimizer steps between log lines and TensorBoard points", only=TRAIN)
    save_steps: float = option(
        500, "optimizer steps between checkpoints, or below 1 the share of the run, like 0.1; 0 for none", only=TRAIN
    )
    save_on_time: str | None = option(None, "save a checkpoint also so long after the last one, like 15m", only=TRAIN)
    save_total_limit: int | None = option(
        None, "keep so many checkpoints; the best and the last one always stay", only=TRAIN
    )
    metric_for_best_model: str | None = option(
        None,
        "metric of the evaluations on the way that chooses the best "
        "model, like f1, exact or loss (its mean over the windows of "
        "predict_file, low is best); its checkpoint stays",
        only=TRAIN,
    )
    early_stopping_patience: int | None = option(
        None, "stop after so many evaluations that are not the best", only=TRAIN
    )
    load_best_model_at_end: bool = option(False, "end with the best model, not the last one", only=TRAIN)
    max_time: str | None = option(None, "save and stop after so long, like 2h; the same command goes on", only=TRAIN)
    push_to_hub: str | None = option(
        None,
        "repository of the hub to put the finished model into, made if it is not there (needs a login)",
        only=TRAIN,
    )
    verbose_logging: bool = option(False, "show what DeepSpeed and Transformers print while starting")
    # accepted from run_squad.py command lines
    local_rank: int = option(-1, "set by the launchers; the environment's LOCAL_RANK counts", retired=True)
    fp16_opt_level: str | None = option(
        None, "apex levels of run_squad.py: O0 = float32, O1 = torch_autocast, O2 = fp16; O3 is refused", retired=True
    )
    threads: int | None = option(None, "retired: tokenizers use RAYON_NUM_THREADS threads", retired=True)
    server_ip: str | None = option(None, "retired: attach a debugger with python -m debugpy", retired=True)
    server_port: str | None = option(None, "retired: attach a debugger with python -m debugpy", retired=True)

    given: frozenset[str] = field(default=frozenset())
    """Names of the options that the command line or the YAML set; the others have their defaults."""

    def to_dict(self) -> dict[str, Any]:
        """Every option by name, as plain values."""
        values = dataclasses.asdict(self)
        del values["given"]
        return values

    def data_file(self, purpose: str) -> str | None:
        """The file named for `purpose` ("train" or "evaluate"), or the classic name; in data_dir, if there is one.

        As run_squad.py has it: without data_dir there is no classic name, and absolute paths stay as they are.
        """
        named = self.train_file if purpose == "train" else self.predict_file
        if not self.data_dir:
            return named
        version = "v2.0" if self.version_2_with_negative else "v1.1"
        named = named or f"{'train' if purpose == 'train' else 'dev'}-{version}.json"
        return ",".join(os.path.join(self.data_dir, os.path.expanduser(part)) for part in named.split(","))


LEAST = {
    "logging_steps": 1,
    "per_gpu_eval_batch_size": 1,
    "n_best_size": 1,
    "max_answer_length": 1,
    "timeout": 1,
    "save_total_limit": 1,
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
    """Raises UserError for a number that is too small, or none at all."""
    for name, least in LEAST.items():
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"{name} must be at least {least}, not {value}")
    if options.seed >= SEEDS:
        raise UserError(f"seed must be less than {SEEDS}, not {options.seed}")
    if options.max_steps <= 0 and not 0 < options.num_train_epochs < math.inf:
        raise UserError(f"num_train_epochs must be more than 0, not {options.num_train_epochs}")


def check_objective(options: RunOptions) -> None:
    """Raises UserError where the options of the loss and of micro-batches by tokens cannot be had together."""
    if options.objective == "marginal" and options.answers != "all":
        raise UserError("objective marginal sums over all gold spans: it needs --answers all")
    if not 0 <= options.label_smoothing < 1:
        raise UserError(f"label_smoothing must be at least 0 and less than 1, not {options.label_smoothing}")
    if options.max_tokens_per_batch is not None and options.max_tokens_per_batch < options.max_seq_length:
        raise UserError(
            f"max_tokens_per_batch {options.max_tokens_per_batch} does not hold one row of max_seq_length "
            f"{options.max_seq_length}: raise it, or lower --max_seq_length"
        )
