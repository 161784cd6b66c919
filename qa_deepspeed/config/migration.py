"""Names of other programs: aliases that mean the same, flags with a replacement, and common short names."""

MOVED = {
    "adam_beta1": "set it in the optimizer section of the DeepSpeed config",
    "adam_beta2": "set it in the optimizer section of the DeepSpeed config",
    "alpha_ce": "--distillation_weight here",
    "alpha_squad": "1 - --distillation_weight here",
    "data_seed": "--seed here",
    "dataloader_num_workers": "not needed: features are read from memory-mapped files",
    "dataloader_drop_last": "removed: every row of an epoch is used",
    "do_predict": "qa-deepspeed predict here",
    "fsdp": "removed: ZeRO-3 partitions parameters, --deepspeed_config zero3",
    "greater_is_better": "not needed: the direction follows from the metric",
    "half_precision_backend": "removed: --bf16, --fp16 or --deepspeed_config zero2_autocast",
    "hub_model_id": "--push_to_hub NAME here",
    "hub_token": "run hf auth login, or set HF_TOKEN",
    "label_smoothing_factor": "--label_smoothing here",
    "logging_dir": "always tensorboard/ in --output_dir",
    "logging_strategy": "--logging_steps here",
    "max_eval_samples": "--max_eval_examples here",
    "max_predict_samples": "removed: give qa-deepspeed predict a shorter file",
    "max_train_samples": "--max_train_examples here",
    "model_revision": "download it (hf download NAME --revision R) and pass its folder as --model_name_or_path",
    "optim": "set it in the optimizer section of the DeepSpeed config",
    "pad_to_max_length": "removed: rows are packed, or padded to the longest of their micro-batch",
    "preprocessing_num_workers": "--num_proc of qa-deepspeed prepare",
    "save_strategy": "--save_steps here: a number of steps, epoch, or 0 for none",
    "teacher_name_or_path": "--teacher_model_name_or_path here",
    "teacher_type": "not needed: the teacher's config says it",
    "temperature": "--distillation_temperature here",
    "test_file": "qa-deepspeed predict FILE",
    "token": "run hf auth login, or set HF_TOKEN",
    "trust_remote_code": "removed: code that comes with a model is not run",
    "warmup_ratio": "--warmup_steps here, a number of steps",
}
"""Flag of run_qa.py or TrainingArguments -> what replaces it here."""

ALIASES = {
    "dataset_config_name": "dataset_config",
    "ddp_timeout": "timeout",
    "max_answer_len": "max_answer_length",
    "max_question_len": "max_query_length",
    "max_seq_len": "max_seq_length",
    "per_device_eval_batch_size": "per_gpu_eval_batch_size",
    "per_device_train_batch_size": "per_gpu_train_batch_size",
    "use_cpu": "no_cuda",
    "validation_file": "predict_file",
}
"""Flag or YAML key of run_qa.py, TrainingArguments or the pipeline -> the option of the same meaning."""

STRATEGIES = {"eval_strategy": "evaluate_during_training", "evaluation_strategy": "evaluate_during_training"}
"""Flag or YAML key of TrainingArguments with the values of `STRATEGY_VALUES` -> the option that is its neighbour."""

STRATEGY_VALUES = {
    "no": ("evaluate_during_training", "false"),
    "steps": ("evaluate_during_training", "true"),
    "epoch": ("eval_steps", "epoch"),
}
"""Value of such a flag -> the option that means the same, and its value."""

SHORT_NAMES = {
    "batch_size": "per_gpu_train_batch_size",
    "data": "train_file",
    "dev_file": "predict_file",
    "ds_config": "deepspeed_config",
    "epochs": "num_train_epochs",
    "eval_file": "predict_file",
    "grad_accum": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "max_length": "max_seq_length",
    "model": "model_name_or_path",
    "num_epochs": "num_train_epochs",
    "output": "output_dir",
    "scheduler": "lr_scheduler_type",
    "steps": "max_steps",
    "stride": "doc_stride",
    "tokenizer": "tokenizer_name",
    "train": "train_file",
    "v2": "version_2_with_negative",
    "warmup": "warmup_steps",
}
"""Name that people try -> the option to suggest."""
