"""Every option of a run, by group. An option touches two places: its field here, and its use.

A field names the commands that use it; the YAML keys and the flags of all commands are read off these fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qa_deepspeed.config.options import option
from qa_deepspeed.qa.metrics.normalization import METRIC_LANGUAGES

EVERY = ("train", "evaluate", "check", "plan", "prepare", "audit")
RUN = ("train", "evaluate", "check")
TRAIN = ("train", "check")
DATA = (*RUN, "prepare")
FEATURES = (*RUN, "prepare", "audit")
TRAIN_FEATURES = (*TRAIN, "prepare", "audit")
SIZE = (*TRAIN, "plan")
DEVICE = (*RUN, "plan")

TRACKERS = ("wandb", "comet", "csv_monitor")
"""Values of report_to that are monitors of DeepSpeed, by the names of their sections in its config."""

AUTO = "auto"
EPOCH = "epoch"
"""Value of eval_steps and save_steps: once in each epoch, after its last step."""

_DECAYING = ("linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt")
SCHEDULES = (*_DECAYING, "constant", "constant_with_warmup")
"""Learning-rate schedules: those of transformers.get_scheduler that need nothing but steps."""


@dataclass(frozen=True)
class DataOptions:
    """Which questions, and how they become features."""

    GROUP: ClassVar[str] = "data"

    data_dir: str | None = option(
        None, DATA, "folder of train_file and predict_file; default names: {train,dev}-v1.1.json, or v2.0"
    )
    train_file: str | None = option(
        None,
        (*TRAIN, "prepare"),
        "SQuAD JSON or rows as JSON, JSON lines, CSV, Parquet (.gz too); several names or a glob; FILE=2 takes each of "
        "its rows twice in an epoch, FILE=0.5 half of them, drawn anew for each epoch",
        several=True,
    )
    predict_file: str | None = option(
        None,
        DATA,
        "questions to evaluate on, in the same formats; of several files each has scores too",
        several=True,
    )
    validation_split: float = option(
        0.0,
        (*TRAIN, "prepare"),
        "evaluate on this part of train_file's contexts, drawn by the seed; train on the rest",
    )
    dataset_name: str | None = option(None, DATA, "data set of the hub, where no file is given")
    dataset_config: str | None = option(None, DATA, "configuration of dataset_name")
    train_split: str = option("train", (*TRAIN, "prepare"), "split of dataset_name to train on")
    predict_split: str = option("validation", DATA, "split of dataset_name to evaluate on")
    id_column: str = option("id", FEATURES, "column of rows that holds the question's id")
    question_column: str = option("question", FEATURES, "column of rows that holds the question")
    context_column: str = option("context", FEATURES, "column of rows that holds the context")
    answers_column: str = option("answers", FEATURES, "column of rows that holds the answers (text, answer_start)")
    is_impossible_column: str = option(
        "is_impossible", FEATURES, "column of rows that says whether a question is unanswerable"
    )
    answer_text_column: str | None = option(
        None, FEATURES, "column of an answer's text, in tables with one answer a row; left out, its usual names"
    )
    answer_start_column: str | None = option(None, FEATURES, "column of the answer's start, the same")
    encoding: str | None = option(None, FEATURES, "encoding of the data files; left out, UTF-8 or their mark")
    version_2_with_negative: bool = option(False, FEATURES, "some questions are unanswerable (SQuAD v2.0)")
    max_seq_length: int = option(384, EVERY, "longest row (question and window of the context), in tokens")
    doc_stride: int = option(128, FEATURES, "tokens from one window of a long context to the next")
    doc_stride_is: str = option(
        "step",
        FEATURES,
        "meaning of doc_stride: step from window to window (run_squad.py) or overlap (run_qa.py)",
        choices=("step", "overlap"),
    )
    max_query_length: int = option(64, FEATURES, "longest question, in tokens; the rest is truncated and counted")
    windows_without_answer: str = option(
        "keep",
        TRAIN_FEATURES,
        "training windows without the answer of their question (v1.1): keep, drop, or sample one per question",
        choices=("keep", "drop", "sample"),
    )
    answers: str = option(
        "first",
        TRAIN_FEATURES,
        "gold answers of a question to train on: the first, or all (which objective marginal uses)",
        choices=("first", "all"),
    )
    max_train_examples: int | None = option(None, TRAIN_FEATURES, "train on this many questions, drawn by seed")
    max_eval_examples: int | None = option(None, DATA, "evaluate on the first questions, this many")
    do_lower_case: bool = option(False, FEATURES, "lower-case the text; left out, the tokenizer's own setting")
    lang_id: int = option(0, RUN, "language id of the text, for multilingual XLM models")
    cache_dir: str | None = option(
        None, EVERY, "folder for hub files (hub/) and features (features/); default: a folder beside the data"
    )
    overwrite_cache: bool = option(False, DATA, "build the features again even if the cache has them")


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and what of it is trained."""

    GROUP: ClassVar[str] = "model"

    model_name_or_path: str | None = option(None, EVERY, "checkpoint folder or name on the hub")
    model_type: str | None = option(None, EVERY, "model family; must not contradict the checkpoint")
    config_name: str | None = option(None, EVERY, "folder or name of the config, if not the model's own")
    tokenizer_name: str | None = option(None, EVERY, "folder or name of the tokenizer, if not the model's own")
    qa_head: str | None = option(
        None,
        DEVICE,
        "span: start and end logits; beam: ends that depend on the start (XLNet, XLM); default: the checkpoint's own",
        choices=("span", "beam"),
    )
    student_layers: str | None = option(
        None,
        SIZE,
        "start from these layers of model_name_or_path only, counted from 0, like 0,2,4: a smaller model",
        several=True,
    )
    attn_implementation: str | None = option(
        None, DEVICE, "eager, sdpa, flash_attention_2 or flash_attention_3; default: the fastest available"
    )
    lora_rank: int | None = option(
        None, SIZE, "train LoRA adapters of this rank and the head (needs peft); the adapter is saved"
    )
    lora_alpha: int = option(16, SIZE, "adapters are scaled by lora_alpha / lora_rank")
    lora_dropout: float = option(0.0, SIZE, "dropout before the adapters")
    lora_target_modules: str = option(
        "all-linear", SIZE, "modules with adapters, like query,value; or all linear ones but the head's", several=True
    )
    freeze: str | None = option(
        None, SIZE, "do not train these: embeddings, and layers by number, like embeddings,0-5", several=True
    )


@dataclass(frozen=True)
class TrainingOptions:
    """Batches, objective, optimizer and schedule."""

    GROUP: ClassVar[str] = "training"

    do_train: bool = option(True, TRAIN, "train; false with do_eval: only evaluate")
    dry_run: bool = option(False, TRAIN, "only say whether the run would start, like qa-deepspeed check")
    per_gpu_train_batch_size: int = option(
        8, (*SIZE, "audit"), "micro-batch size: rows of one forward pass on one rank"
    )
    gradient_accumulation_steps: int = option(1, SIZE, "micro-batches per optimizer step")
    global_batch_size: int | None = option(
        None, SIZE, "rows of one optimizer step over all ranks; gradient accumulation follows from it"
    )
    max_tokens_per_batch: int | None = option(
        None,
        SIZE,
        "cut micro-batches by tokens on a rank, padding included, instead of by rows; the rows of a step stay",
    )
    batch_layout: str = option(
        AUTO,
        TRAIN,
        "packed: rows end to end without padding; padded: to one length; auto: packed if the model's logits stay equal",
        choices=(AUTO, "packed", "padded"),
    )
    group_by_length: bool | None = option(
        None, TRAIN, "steps of rows of similar length; default: only where rows are padded"
    )
    num_train_epochs: float = option(3.0, TRAIN, "passes over the training rows")
    max_steps: int = option(-1, TRAIN, "optimizer steps; if positive, num_train_epochs does not count")
    learning_rate: float = option(5e-5, TRAIN, "peak learning rate")
    lr_scheduler_type: str = option(
        "linear", TRAIN, "schedule after the warm-up, as transformers.get_scheduler", choices=SCHEDULES
    )
    layerwise_lr_decay: float = option(
        1.0,
        TRAIN,
        "learning rate of a layer over that of the layer above it; the head has learning_rate",
    )
    warmup_steps: int = option(0, TRAIN, "optimizer steps of linear warm-up")
    weight_decay: float = option(0.0, TRAIN, "decoupled weight decay (none on biases and norms)")
    adam_epsilon: float = option(1e-8, TRAIN, "epsilon of Adam")
    max_grad_norm: float = option(1.0, TRAIN, "clip gradients to this norm; 0 for no clipping")
    objective: str = option(
        "mean",
        TRAIN,
        "loss of a row: mean of start and end cross-entropy, or marginal over all gold spans (answers all)",
        choices=("mean", "marginal"),
    )
    label_smoothing: float = option(0.0, TRAIN, "ratio of the target spread over all allowed positions")
    seed: int = option(42, FEATURES, "seed of everything random")


@dataclass(frozen=True)
class DistillationOptions:
    """Learning from the answers of trained models."""

    GROUP: ClassVar[str] = "distillation"

    teacher_model_name_or_path: str | None = option(
        None,
        TRAIN,
        "trained models to learn from, which have the student's tokenizer; their logits are computed once and cached, "
        "the probabilities of several averaged",
        several=True,
    )
    distillation_weight: float = option(0.5, TRAIN, "weight of the teacher in the loss; the labels have the rest")
    distillation_temperature: float = option(
        2.0, TRAIN, "temperature that softens the probabilities of teacher and student in the teacher's part"
    )


@dataclass(frozen=True)
class EvaluationOptions:
    """When to evaluate, and how logits become answers."""

    GROUP: ClassVar[str] = "evaluation"

    do_eval: bool = option(False, TRAIN, "evaluate at the end")
    evaluate_during_training: bool = option(False, TRAIN, "evaluate also while training, every eval_steps")
    eval_steps: float | str | None = option(
        None,
        TRAIN,
        "optimizer steps between evaluations while training (which it implies); below 1 a ratio of the run; left out, "
        "logging_steps, or 500 where that is left out too",
        words=(EPOCH,),
    )
    eval_all_checkpoints: bool = option(False, RUN, "evaluate every checkpoint in output_dir")
    per_gpu_eval_batch_size: int = option(8, RUN, "rows of one evaluation micro-batch on one rank")
    null_score_diff_threshold: float | str = option(
        0.0,
        RUN,
        "answer nothing where null odds exceed this; auto: tune it for F1 on predict_file and store it in the model; "
        "left out, evaluate uses the stored one",
        words=(AUTO,),
    )
    n_best_size: int = option(20, RUN, "answers per question in the n-best list")
    max_answer_length: int = option(30, (*RUN, "audit"), "longest answer, in tokens")
    decode_mode: str = option(
        "exact",
        RUN,
        "exact: the best of all spans; hf: as Transformers' example; classic: as run_squad.py (hf and classic imply "
        "--gather full)",
        choices=("exact", "hf", "classic"),
    )
    gather: str = option(
        "candidates",
        RUN,
        "what rank 0 receives of each row: its best spans, or all its logits, saved as logits.npz",
        choices=("candidates", "full"),
    )
    best_window_only: bool = option(
        False, RUN, "count a span only in the window with most context around its start (max context)"
    )
    merge_duplicate_texts: bool = option(False, RUN, "of several spans with the same text, keep the best only")
    metric_language: str = option(
        "en",
        RUN,
        "normalization of the metrics: en is the official one; zh, ja and th count characters",
        choices=METRIC_LANGUAGES,
    )


@dataclass(frozen=True)
class CheckpointOptions:
    """The output folder: what is saved, resumed and kept."""

    GROUP: ClassVar[str] = "checkpoints"

    output_dir: str | None = option(
        None,
        RUN,
        "folder for the model, checkpoints, predictions and TensorBoard; evaluate: left out, scores are only printed",
    )
    overwrite_output_dir: bool = option(
        False, RUN, "start again in an output_dir that holds another run; evaluate: replace another model's answers"
    )
    resume_from_checkpoint: str = option(
        "auto", TRAIN, "auto: the newest checkpoint of this run in output_dir, if any; never; or a checkpoint folder"
    )
    resume_with_changes: str | None = option(
        None,
        TRAIN,
        "resume although these settings differ: names with commas between, like learning_rate,seed",
        several=True,
    )
    save_steps: float | str = option(
        500, TRAIN, "optimizer steps between checkpoints; below 1 a ratio of the run; 0: none", words=(EPOCH,)
    )
    save_on_time: str | None = option(None, TRAIN, "also save this long after the last checkpoint, like 15m")
    save_total_limit: int | None = option(None, TRAIN, "checkpoints to keep; the best and the last always stay")
    save_async: str = option(
        AUTO,
        TRAIN,
        "write checkpoints while training continues, from copies in host memory; auto: where these fit",
        choices=(AUTO, "true", "false"),
    )
    save_retry: int = option(600, TRAIN, "seconds to keep trying where a full disk keeps the end from being saved")
    metric_for_best_model: str | None = option(
        None, TRAIN, "metric that selects the best checkpoint, like f1, exact, or loss (lower is better)"
    )
    early_stopping_patience: int | None = option(
        None, TRAIN, "early stopping: end after this many evaluations without a better one"
    )
    load_best_model_at_end: bool = option(False, TRAIN, "end with the best model instead of the last")
    max_time: str | None = option(None, TRAIN, "save and stop after this long, like 2h; the same command resumes")
    push_to_hub: str | None = option(None, TRAIN, "upload the finished model to this hub repository (needs a login)")


@dataclass(frozen=True)
class EngineOptions:
    """DeepSpeed config, precision and device."""

    GROUP: ClassVar[str] = "DeepSpeed and precision"

    deepspeed_config: str | None = option(
        None,
        DEVICE,
        "shipped config (zero0 to zero3, zero3_offload, ...; see ds_configs/README.md) or a JSON file; default: auto, "
        "the fastest shipped one that fits into memory",
    )
    nvme_path: str | None = option(None, DEVICE, "folder on a local NVMe disk of each node, for zero3_nvme")
    gradient_checkpointing: bool = option(
        False, SIZE, "recompute activations in the backward pass: less memory, a third more work"
    )
    flat_parameters: bool = option(
        True, TRAIN, "hold each layer's weights in one parameter per weight-decay group: less work on the host"
    )
    torch_compile: bool = option(False, TRAIN, "compile each layer; pays off in long runs on GPUs")
    cuda_graphs: str = option(
        AUTO,
        TRAIN,
        "run forward and backward of packed rows as one CUDA graph per shape; auto: on one GPU, in bf16 or float32",
        choices=(AUTO, "true", "false"),
    )
    bf16: bool = option(False, DEVICE, "train and evaluate in bfloat16")
    fp16: bool = option(False, DEVICE, "train and evaluate in float16 with loss scaling (GPU only)")
    no_cuda: bool = option(False, DEVICE, "run on the CPU even if there is a GPU")
    timeout: int = option(600, (*RUN, "prepare"), "seconds before a hung rank or builder is treated as failed")


@dataclass(frozen=True)
class LoggingOptions:
    """What is printed and recorded."""

    GROUP: ClassVar[str] = "logging"

    logging_steps: int | None = option(
        None,
        TRAIN,
        "optimizer steps between log lines and TensorBoard points; left out, 1 % of the run's, and at most 500",
    )
    report_to: str | None = option(
        None,
        RUN,
        "where curves go: tensorboard (left out, that), and the trackers wandb, comet and csv_monitor, which get those "
        "of training; or none; metrics.jsonl is always written",
        choices=("tensorboard", *TRACKERS, "none"),
        several=True,
    )
    profile_steps: str | None = option(
        None, TRAIN, "write torch's trace of these optimizer steps, like 10-12, beside TensorBoard's events"
    )
    run_name: str | None = option(None, TRAIN, "name of the run in trackers; left out, the name of output_dir")
    verbose_logging: bool = option(False, EVERY, "show what DeepSpeed and Transformers print at start")


@dataclass(frozen=True)
class DeprecatedOptions:
    """Flags of run_squad.py that are accepted and whose work something else does now."""

    GROUP: ClassVar[str] = "deprecated"

    local_rank: int = option(-1, RUN, "set by launchers; the environment's LOCAL_RANK counts", deprecated=True)
    fp16_opt_level: str | None = option(
        None, DEVICE, "apex levels: O0 float32, O1 torch_autocast, O2 fp16; O3 is refused", deprecated=True
    )
    threads: int | None = option(
        None, RUN, "ignored: tokenizers use RAYON_NUM_THREADS threads, by default all cores", deprecated=True
    )
    server_ip: str | None = option(
        None,
        RUN,
        "ignored: attach a debugger with python -m debugpy --listen PORT -m qa_deepspeed ...",
        deprecated=True,
    )
    server_port: str | None = option(None, RUN, "ignored: see server_ip", deprecated=True)
