"""The command line as a whole: the options of every command, help, versions, and errors that name the right place."""

import argparse
import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qa_deepspeed.cli.main import COMMANDS, main
from qa_deepspeed.config import options
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.utils.errors import LostRankError, UserError

OPTIONS = {
    "train": (
        "adam_epsilon answer_start_column answer_text_column answers answers_column attn_implementation batch_layout "
        "best_window_only bf16 cache_dir config config_name context_column cuda_graphs data_dir dataset_config "
        "dataset_config_name dataset_name ddp_timeout decode_mode deepspeed deepspeed_config distillation_temperature "
        "distillation_weight do_eval do_lower_case "
        "do_train doc_stride doc_stride_is dry_run early_stopping_patience encoding eval_all_checkpoints eval_steps "
        "eval_strategy evaluate_during_training evaluation_strategy flat_parameters fp16 fp16_opt_level freeze gather "
        "global_batch_size gradient_accumulation_steps gradient_checkpointing group_by_length id_column "
        "is_impossible_column label_smoothing lang_id layerwise_lr_decay learning_rate load_best_model_at_end "
        "local_rank logging_steps lora_alpha lora_dropout lora_rank lora_target_modules lr_scheduler_type "
        "max_answer_len max_answer_length max_eval_examples max_grad_norm max_query_length max_question_len "
        "max_seq_len max_seq_length max_steps max_time max_tokens_per_batch max_train_examples merge_duplicate_texts "
        "metric_for_best_model metric_language model_name_or_path model_type n_best_size no_cuda "
        "null_score_diff_threshold num_train_epochs nvme_path objective output_dir overwrite_cache "
        "overwrite_output_dir per_device_eval_batch_size per_device_train_batch_size per_gpu_eval_batch_size "
        "per_gpu_train_batch_size predict_file predict_split print_config print_schema "
        "profile_steps push_to_hub qa_head "
        "question_column report_to resume_from_checkpoint resume_with_changes run_name save_async save_on_time "
        "save_retry save_steps save_total_limit seed server_ip server_port student_layers teacher_model_name_or_path "
        "threads timeout tokenizer_name "
        "torch_compile train_file train_split use_cpu validation_file validation_split verbose_logging "
        "version_2_with_negative warmup_steps weight_decay windows_without_answer"
    ),
    "evaluate": (
        "answer_start_column answer_text_column answers_column attn_implementation best_window_only bf16 cache_dir "
        "config config_name context_column data_dir dataset_config dataset_config_name dataset_name ddp_timeout "
        "decode_mode deepspeed deepspeed_config do_lower_case doc_stride doc_stride_is encoding eval_all_checkpoints "
        "fp16 fp16_opt_level gather id_column is_impossible_column lang_id local_rank max_answer_len "
        "max_answer_length max_eval_examples max_query_length max_question_len max_seq_len max_seq_length "
        "merge_duplicate_texts metric_language model_name_or_path model_type n_best_size no_cuda "
        "null_score_diff_threshold nvme_path output_dir overwrite_cache overwrite_output_dir "
        "per_device_eval_batch_size per_gpu_eval_batch_size predict_file predict_split print_config print_schema "
        "qa_head question_column report_to seed server_ip server_port threads timeout tokenizer_name use_cpu "
        "validation_file verbose_logging version_2_with_negative"
    ),
    "predict": (
        "align_to_words batch_size context context_column device doc_stride doc_stride_is documents dtype encoding "
        "handle_impossible_answer id_column max_answer_len max_answer_length max_query_length max_question_len "
        "max_seq_len max_seq_length model_name_or_path n_best_size null_score_diff_threshold output "
        "per_device_eval_batch_size per_gpu_eval_batch_size question question_column top_k version_2_with_negative"
    ),
    "demo": "device host port",
    "score": "confidence explain json metric_language null_odds null_odds_threshold",
    "compare": "gold json report",
    "ensemble": "gold metric_language n_best_size null_score_diff_threshold output_dir version_2_with_negative",
    "export": "dtype format max_f1_loss max_shard_size merge_lora predict_file quantize",
    "audit": (
        "answer_start_column answer_text_column answers answers_column cache_dir config config_name context_column "
        "do_lower_case doc_stride doc_stride_is encoding id_column is_impossible_column json max_answer_len "
        "max_answer_length max_query_length max_question_len max_seq_len max_seq_length max_train_examples "
        "model_name_or_path model_type per_device_train_batch_size per_gpu_train_batch_size print_config "
        "question_column seed show strict tokenizer_name verbose_logging version_2_with_negative "
        "windows_without_answer"
    ),
    "prepare": (
        "answer_start_column answer_text_column answers answers_column cache_dir config config_name context_column "
        "data_dir dataset_config dataset_config_name dataset_name ddp_timeout do_lower_case doc_stride "
        "doc_stride_is encoding id_column is_impossible_column max_eval_examples max_query_length max_question_len "
        "max_seq_len max_seq_length max_train_examples model_name_or_path model_type num_proc overwrite_cache "
        "predict_file predict_split print_config question_column seed timeout tokenizer_name train_file train_split "
        "validation_file validation_split verbose_logging version_2_with_negative windows_without_answer"
    ),
    "check": (
        "adam_epsilon answer_start_column answer_text_column answers answers_column attn_implementation batch_layout "
        "best_window_only bf16 cache_dir config config_name context_column cuda_graphs data_dir dataset_config "
        "dataset_config_name dataset_name ddp_timeout decode_mode deepspeed deepspeed_config distillation_temperature "
        "distillation_weight do_eval do_lower_case "
        "do_train doc_stride doc_stride_is dry_run early_stopping_patience encoding eval_all_checkpoints eval_steps "
        "eval_strategy evaluate_during_training evaluation_strategy flat_parameters fp16 fp16_opt_level freeze gather "
        "global_batch_size gradient_accumulation_steps gradient_checkpointing group_by_length hostfile id_column "
        "is_impossible_column label_smoothing lang_id layerwise_lr_decay learning_rate load_best_model_at_end "
        "local_rank logging_steps lora_alpha lora_dropout lora_rank lora_target_modules lr_scheduler_type master_port "
        "max_answer_len max_answer_length max_eval_examples max_grad_norm max_query_length max_question_len "
        "max_seq_len max_seq_length max_steps max_time max_tokens_per_batch max_train_examples merge_duplicate_texts "
        "metric_for_best_model metric_language model_name_or_path model_type n_best_size no_cuda "
        "null_score_diff_threshold num_train_epochs nvme_path objective output_dir overwrite_cache "
        "overwrite_output_dir per_device_eval_batch_size per_device_train_batch_size per_gpu_eval_batch_size "
        "per_gpu_train_batch_size predict_file predict_split print_config profile_steps push_to_hub qa_head "
        "question_column ranks report_to resume_from_checkpoint resume_with_changes run_name save_async save_on_time "
        "save_retry save_steps save_total_limit seed server_ip server_port ssh_port student_layers "
        "teacher_model_name_or_path threads timeout tokenizer_name "
        "torch_compile train_file train_split use_cpu validation_file validation_split verbose_logging "
        "version_2_with_negative warmup_steps weight_decay windows_without_answer"
    ),
    "sweep": "at_once launcher list",
    "plan": (
        "attn_implementation bf16 cache_dir config config_name cpu_memory deepspeed_config fp16 fp16_opt_level freeze "
        "global_batch_size gpu_memory gpus_per_node gradient_accumulation_steps gradient_checkpointing json "
        "lora_alpha lora_dropout lora_rank lora_target_modules max_seq_len max_seq_length max_tokens_per_batch "
        "measure-roof measure_peak model_name_or_path model_type no_cuda nodes nvme_path per_device_train_batch_size "
        "per_gpu_train_batch_size print_config qa_head student_layers tokenizer_name use_cpu verbose_logging"
    ),
    "convert": (
        "answer_start_column answer_text_column answers_column context_column encoding id_column "
        "is_impossible_column question_column"
    ),
    "sample": "dev_articles seed train_articles",
    "completion": "",
}
"""Every option of every command, written down: a new flag is a decision."""

NOT_OF_A_FILE = {"config", "print_config", "print_schema", "deepspeed"}
OPTIONS["init"] = " ".join(set(OPTIONS["train"].split()) - NOT_OF_A_FILE)
"""init writes what train reads."""

OF_TRAIN = (set(OPTIONS["train"].split()) - NOT_OF_A_FILE) | {"config"}
OPTIONS["sweep"] += f" ranks {' '.join(OF_TRAIN)}"  # the options of a run, each with one value or several

TRAIN_BEFORE = (
    "adam_epsilon answers answers_column attn_implementation best_window_only bf16 cache_dir config config_name "
    "context_column data_dir dataset_config dataset_name decode_mode deepspeed deepspeed_config do_eval "
    "do_lower_case do_train doc_stride doc_stride_is dry_run early_stopping_patience eval_all_checkpoints "
    "evaluate_during_training fp16 fp16_opt_level gather global_batch_size gradient_accumulation_steps "
    "gradient_checkpointing id_column is_impossible_column label_smoothing lang_id learning_rate "
    "load_best_model_at_end local_rank logging_steps lora_alpha lora_dropout lora_rank lora_target_modules "
    "lr_scheduler_type max_answer_length max_eval_examples max_grad_norm max_query_length max_seq_length "
    "max_steps max_time max_tokens_per_batch max_train_examples merge_duplicate_texts metric_for_best_model "
    "metric_language model_name_or_path model_type n_best_size no_cuda null_score_diff_threshold num_train_epochs "
    "nvme_path objective output_dir overwrite_cache overwrite_output_dir per_gpu_eval_batch_size "
    "per_gpu_train_batch_size predict_file predict_split push_to_hub qa_head question_column "
    "resume_from_checkpoint resume_with_changes save_on_time save_retry save_steps save_total_limit seed server_ip "
    "server_port threads timeout tokenizer_name train_file train_split verbose_logging version_2_with_negative "
    "warmup_steps weight_decay windows_without_answer "
)
EVALUATE_BEFORE = (
    "answers_column attn_implementation best_window_only bf16 cache_dir config config_name context_column "
    "data_dir dataset_config dataset_name decode_mode deepspeed deepspeed_config do_lower_case doc_stride "
    "doc_stride_is eval_all_checkpoints fp16 fp16_opt_level gather id_column is_impossible_column lang_id "
    "local_rank max_answer_length max_eval_examples max_query_length max_seq_length merge_duplicate_texts "
    "metric_language model_name_or_path model_type n_best_size no_cuda null_score_diff_threshold output_dir "
    "overwrite_cache per_gpu_eval_batch_size predict_file predict_split qa_head question_column seed server_ip "
    "server_port threads timeout tokenizer_name verbose_logging version_2_with_negative "
)
"""The options of `train` and `evaluate` in version 0.1: they stay."""

GROUPS = (
    "data",
    "model",
    "training",
    "distillation",
    "evaluation",
    "checkpoints",
    "DeepSpeed and precision",
    "logging",
    "deprecated",
)


def parser_of(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.set_defaults(command=command)
    importlib.import_module(COMMANDS[command][0]).add_arguments(parser)
    return parser


def options_of(command: str) -> set[str]:
    flags = [flag for action in parser_of(command)._actions for flag in action.option_strings]
    return {flag.lstrip("-") for flag in flags}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_are_those_written_down(command: str) -> None:
    assert options_of(command) == set(OPTIONS[command].split())


def test_options_of_before_stay() -> None:
    assert set(TRAIN_BEFORE.split()) <= options_of("train")
    assert set(EVALUATE_BEFORE.split()) <= options_of("evaluate")


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "qa_deepspeed", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_has_groups_choices_defaults_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "train", "--help")
    for group in GROUPS:
        assert f"\n{group}:\n" in out
    assert "--decode_mode {exact,hf,classic}" in out
    words = " ".join(out.split())
    assert "--warmup_steps INT optimizer steps of linear warm-up (default: 0)" in words
    assert "--do_eval [true|false] evaluate at the end (default: false)" in words
    assert "Example: deepspeed --num_gpus 8 --module qa_deepspeed train" in words
    assert "learning_rate" not in printed(capsys, "audit", "--help")
    assert printed(capsys, "help", "audit") == printed(capsys, "audit", "--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"Example: {COMMANDS[command][2].split()[0]}" in " ".join(printed(capsys, command, "--help").split())


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "--help")
    assert all(f"  {command}" in out for command in COMMANDS)


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--version").splitlines()
    assert [line.split()[0] for line in lines] == ["qa_deepspeed", "torch", "transformers", "deepspeed"]
    assert all(line.split()[1][0].isdigit() for line in lines)


def test_help_and_versions_import_nothing_heavy() -> None:
    program = (
        "import sys; from qa_deepspeed.cli.main import main\n"
        "try: main([sys.argv[1]])\n"
        "except SystemExit: print([name for name in ('torch', 'transformers', 'deepspeed') if name in sys.modules])"
    )
    for flag in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", program, flag], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "x.json", "--learning_rate", "1"], "--learning_rate is an option of train, check, not of this"),
        (["plan", "--validation_file", "x"], "--validation_file is an option of train, evaluate, check, prepare, not"),
        (["train", "--model", "x", "--lr", "1"], "'--model_name_or_path'?; unknown argument --lr; did you mean"),
        (
            ["train", "--warmup_ratio", "1", "--optim", "x"],
            "--warmup_steps here, a number of steps; unknown argument --optim",
        ),
        (["tain"], "unknown command 'tain'; did you mean 'train'?"),
        (
            ["train", "--do_eval"],
            "missing: --model_name_or_path (a folder of a model, or a name on the hub), --train_file (or "
            "--dataset_name, or --data_dir), --predict_file (or --validation_split 0.1), --output_dir (a folder for",
        ),
        (["train", "--data_dir", "d", "--model_name_or_path", "m"], "missing: --output_dir (a folder for the model"),
        (
            ["evaluate", "--output_dir", "o"],
            "or a name on the hub), --predict_file (or --dataset_name, or --data_dir) ",
        ),
        (
            ["train", "--eval_strategy", "often"],
            "argument --eval_strategy/--evaluation_strategy: must be one of no, steps, epoch, not 'often'",
        ),
        (
            ["train", "--report_to", "tensorboard,mlflow"],
            "'report_to' in the command line must be one of tensorboard, wandb, comet, csv_monitor, none, not",
        ),
    ],
)
def test_errors_name_the_right_place(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert message in error


def test_print_config_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed is YAML that --config reads, and stands for the same run."""
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-4\nnull_score_diff_threshold: auto\nversion_2_with_negative: true\n")
    given = ["--config", str(file), "--output_dir", "runs/[one]", "--per_device_train_batch_size", "4", "--bf16"]
    out = printed(capsys, "train", *given, "--print_config")
    assert "# weight_decay: 0.0" in out.splitlines()
    again = tmp_path / "again.yaml"
    again.write_text(out)
    flags = {"output_dir": "runs/[one]", "per_gpu_train_batch_size": "4", "bf16": "true"}
    expected = options.build(RunOptions, "train", flags, str(file))
    assert options.build(RunOptions, "train", {}, str(again)) == expected
    assert set(yaml.safe_load(out)) == set(expected.given)


@pytest.mark.parametrize("name", ["eval_strategy", "evaluation_strategy"])
def test_strategies_of_training_arguments_are_accepted(tmp_path: Path, name: str) -> None:
    file = tmp_path / "run.yaml"
    for value, expected in (("steps", True), ("no", False), ("'no'", False)):
        file.write_text(f"{name}: {value}\nper_device_train_batch_size: 4\nreport_to: [tensorboard]\n")
        found = options.build(RunOptions, "train", {}, str(file))
        assert found.evaluate_during_training is expected and found.report_to == "tensorboard"
        assert found.origin("evaluate_during_training") == found.origin("per_gpu_train_batch_size") == str(file)
        given = parser_of("train").parse_args([f"--{name}", value.strip("'"), "--evaluate_during_training"])
        assert given.evaluate_during_training == "true"
        given = parser_of("train").parse_args(["--evaluate_during_training", f"--{name}", value.strip("'")])
        assert given.evaluate_during_training == str(expected).lower()
    file.write_text(f"{name}: epoch\n")
    found = options.build(RunOptions, "train", {}, str(file))
    assert found.eval_steps == "epoch" and found.evaluates_during_training
    assert parser_of("train").parse_args([f"--{name}=epoch"]).eval_steps == "epoch"
    file.write_text(f"{name}: often\n")
    with pytest.raises(UserError, match=f"option '{name}' in {file} must be one of no, steps, epoch, not 'often'"):
        options.build(RunOptions, "train", {}, str(file))


def test_unknown_names_of_file_and_command_line_are_one_error(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optim: adamw_torch\nlr: 1\n")
    with pytest.raises(UserError) as caught:
        options.build(RunOptions, "train", {"model": "x"}, str(file))
    assert str(caught.value).count("unknown option") == 3 and "did you mean 'learning_rate'" in str(caught.value)


def test_a_value_comes_from_the_command_line_the_file_or_the_default(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-4\nseed: 3\n")
    found = options.build(RunOptions, "train", {"seed": "4"}, str(file))
    origins = {name: found.origin(name) for name in ("seed", "learning_rate", "weight_decay")}
    assert origins == {"seed": "the command line", "learning_rate": str(file), "weight_decay": "default"}


@pytest.mark.parametrize("command", ["check", "plan", "prepare"])
def test_commands_that_look_at_a_run_take_its_whole_file(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also keys that the command has no use for."""
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-4\nsave_steps: 3\nmax_seq_length: 96\nn_best_size: 4\n")
    assert "max_seq_length: 96" in printed(capsys, command, "--config", str(file), "--print_config").splitlines()
    file.write_text("learning_rat: 1e-4\n")
    with pytest.raises(SystemExit):
        main([command, "--config", str(file)])
    assert "did you mean 'learning_rate'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("redirected", "status", "said"),
    [
        ("--version >&-", 0, ""),
        ("--version <&- >&- 2>&-", 0, ""),
        ("nope 2>&-", 2, ""),
        ("nope 2>/dev/full", 2, ""),
        ("--version >/dev/full", 2, "No space left on device"),
        ("predict - --model_name_or_path x <&-", 2, "standard input: the file is empty"),
    ],
)
def test_closed_and_full_standard_streams(redirected: str, status: int, said: str) -> None:
    """Neither a traceback nor the status of a lost rank, for which launchers restart a run."""
    ran = subprocess.run(
        f"{shlex.quote(sys.executable)} -m qa_deepspeed {redirected}", shell=True, capture_output=True, text=True
    )
    assert ran.returncode == status and "Traceback" not in ran.stderr and said in ran.stderr, ran.stderr


@pytest.mark.parametrize(("error", "status"), [(LostRankError("rank 1 waited"), 1), (UserError("no such file"), 2)])
def test_launchers_restart_a_run_that_lost_a_rank_but_no_mistake(
    error: UserError, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr("qa_deepspeed.cli.main._run", fail)
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == status
    assert capsys.readouterr().err == f"qa-deepspeed: error: {error}\n"
