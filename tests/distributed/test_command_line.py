"""The main job as users start it: alone, under DeepSpeed's launcher, under torchrun; and what it leaves behind."""

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from tests.distributed.launching import alone, by_deepspeed, by_torchrun, flags, losses, run

pytestmark = pytest.mark.distributed

FILES = ("predictions.json", "nbest_predictions.json", "null_odds.json", "metrics.json")


@pytest.fixture(scope="module")
def trained(base_options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ranks at ZeRO-2 under DeepSpeed's launcher, with checkpoints and evaluations on the way."""
    folder = tmp_path_factory.mktemp("trained")
    options = {
        **base_options,
        "output_dir": folder / "run",
        "deepspeed_config": "zero2",
        "save_steps": 5,
        "per_gpu_train_batch_size": 4,
        "do_eval": True,
        "logging_steps": 4,
        "evaluate_during_training": True,
    }
    done = run(by_deepspeed(2, "train", *flags(**options)), folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder / "stdout").write_text(done.stdout)
    return folder / "run"


def test_the_log_has_loss_rate_speed_and_scores(trained: Path) -> None:
    printed = (trained.parent / "stdout").read_text()
    words = (
        "step 4/12  epoch ",
        "loss ",
        "lr ",
        "grad_norm",
        "questions/s",
        "tokens/s",
        "padding",
        "MFU",
        "ETA",
        "  answerable F1 ",
        "  unanswerable F1 ",
        "  loss ",
    )
    for part in (*words, "zero2 (ZeRO stage 2, fp32): 12 optimizer steps, 8 rows a step"):
        assert part in printed
    assert "FutureWarning" not in printed


def test_metrics_have_the_classic_keys_and_tensorboard_the_same_numbers(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = json.loads((trained / "metrics.json").read_text())
    parts = {f"{part}_{name}" for part in ("HasAns", "NoAns") for name in ("exact", "f1", "total")}
    best = {"best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"}
    assert {"exact", "f1", "total"} | parts | best <= metrics.keys()
    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    assert events.Scalars("eval/f1")[-1].value == pytest.approx(metrics["f1"])
    assert [event.step for event in events.Scalars("train/loss")] == [4, 8, 12]
    np.testing.assert_allclose([event.value for event in events.Scalars("train/loss")], losses(trained), rtol=1e-6)


def test_the_saved_model_loads_in_plain_transformers_and_gives_the_evaluators_logits(trained: Path) -> None:
    """The n-best list's first entry, recomputed from the logits that Transformers gives for the same question."""
    model = AutoModelForQuestionAnswering.from_pretrained(trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    options = torch.load(trained / "training_args.bin", weights_only=True)
    assert options == json.loads((trained / "training_args.json").read_text())
    nbest = json.loads((trained / "nbest_predictions.json").read_text())
    articles = json.loads(Path(options["predict_file"]).read_text())["data"]
    asked = [(qa, p["context"]) for a in articles for p in a["paragraphs"] for qa in p["qas"]][:10]
    for qa, context in asked:
        row = tokenizer(qa["question"], context, return_tensors="pt", return_offsets_mapping=True)
        offsets, inside = row.pop("offset_mapping")[0].tolist(), row.sequence_ids(0)
        with torch.no_grad():
            logits = model(**row)
        best = next(entry for entry in nbest[qa["id"]] if entry["text"])
        tokens = [i for i, part in enumerate(inside) if part == 1]
        start = next(i for i in tokens if offsets[i][0] == best["start"])
        end = next(i for i in tokens if offsets[i][1] == best["start"] + len(best["text"]))
        assert float(logits.start_logits[0, start]) == pytest.approx(best["start_logit"], abs=1e-5)
        assert float(logits.end_logits[0, end]) == pytest.approx(best["end_logit"], abs=1e-5)


def as_trained(model: Path, output_dir: Path, **extra: object) -> list[str]:
    """Flags that evaluate `model` on the questions and with the settings of its training."""
    options = json.loads((model / "training_args.json").read_text())
    kept = ("predict_file", "cache_dir", "version_2_with_negative", "max_seq_length", "doc_stride")
    return flags(model_name_or_path=model, output_dir=output_dir, **{name: options[name] for name in kept}, **extra)


def test_evaluate_without_an_output_folder_prints_the_scores_and_writes_nothing(trained: Path, tmp_path: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    asked = as_trained(trained, tmp_path)
    place = asked.index("--output_dir")
    done = run(alone("evaluate", *asked[:place], *asked[place + 2 :]), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"EM {metrics['exact']:.2f}  F1 {metrics['f1']:.2f}  answerable" in done.stdout
    assert "nothing is written; --output_dir keeps answers, scores and the report" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_evaluate_gives_the_same_files_on_any_number_of_ranks(trained: Path, tmp_path: Path, ranks: int) -> None:
    """Byte for byte: predictions, n-best lists, null odds and metrics as at the end of training."""
    asked = as_trained(trained, tmp_path)
    done = run(by_torchrun(ranks, "evaluate", *asked) if ranks > 1 else alone("evaluate", *asked), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes(), name


def test_evaluate_uses_the_settings_of_the_training(base_options: dict[str, object], tmp_path: Path) -> None:
    """Lengths and stride that no option of `evaluate` names are those that the model was trained with."""
    short = {"max_seq_length": 96, "doc_stride": 16, "doc_stride_is": "overlap", "max_answer_length": 2}
    options = {**base_options, **short, "max_query_length": 40, "max_steps": 2, "output_dir": tmp_path / "run"}
    done = run(alone("train", *flags(**options, do_eval=True)), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    asked = {"model_name_or_path": tmp_path / "run", "predict_file": options["predict_file"]}
    asked["cache_dir"] = options["cache_dir"]
    done = run(alone("evaluate", *flags(**asked, output_dir=tmp_path / "again")), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "as the model was trained: max_seq_length 96, doc_stride 16, doc_stride_is overlap" in done.stdout
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    done = run(alone("evaluate", *flags(**asked, output_dir=tmp_path / "other", max_answer_length=9)), tmp_path)
    assert done.returncode == 0 and "max_answer_length" not in done.stdout
    nbest = json.loads((tmp_path / "other/nbest_predictions.json").read_text())
    assert any(len(entry["text"].split()) > 2 for entries in nbest.values() for entry in entries)


def test_zero3_evaluates_as_one_rank_does(trained: Path, tmp_path: Path) -> None:
    """Byte for byte, since an evaluation uses torch's linear operation, not DeepSpeed's."""
    asked = as_trained(trained, tmp_path, deepspeed_config="zero3")
    done = run(by_torchrun(2, "evaluate", *asked), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes(), name


def test_eval_all_checkpoints_puts_the_weights_together_from_the_shards(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    asked = as_trained(tmp_path / "run", tmp_path / "run", eval_all_checkpoints=True)
    done = run(alone("evaluate", *asked), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(path.read_text()) for path in sorted((tmp_path / "run/evaluations").glob("*/metrics.json"))]
    assert len(found) == 2 and found[0] != found[1]


STAGES = ("zero0", "zero1", "zero2", "zero3")
"""Three launches each: `launch/test.sh -m slow -k killed_between`."""


@pytest.mark.slow
@pytest.mark.parametrize("config", STAGES)
def test_a_run_killed_between_checkpoints_resumes_exactly(
    base_options: dict[str, object], tmp_path: Path, config: str
) -> None:
    """Killed after step 8 (its last checkpoint is of step 6), resumed by the same command: the same weights.

    A run is stopped by taking away what an uninterrupted one wrote after step 6.
    """
    options = {
        **base_options,
        "deepspeed_config": config,
        "save_steps": 6,
        "output_dir": tmp_path / "whole",
        "per_gpu_train_batch_size": 4,
    }
    command = (
        by_torchrun(2, "train", *flags(**options))
        if config in ("zero2", "zero3")
        else alone("train", *flags(**options))
    )
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    first_losses = losses(tmp_path / "whole")
    _forget_after(tmp_path / "whole", "checkpoint-6")
    again = run(command, tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resuming from" in again.stdout and "step 6 of 12" in again.stdout
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == whole
    np.testing.assert_array_equal(losses(tmp_path / "whole")[-6:], first_losses[-6:])
    third = run(command, tmp_path)
    assert third.returncode == 0 and "nothing to do" in third.stdout


@pytest.fixture
def two_files(sample: Path, tmp_path: Path) -> dict[str, object]:
    """Options of a mixture of two training files, and two evaluation files of one base name."""
    for name in ("train", "dev"):
        document = json.loads((sample / f"{name}.json").read_text())
        half = len(document["data"]) // 3
        for folder, articles in (("one", document["data"][:half]), ("two", document["data"][half:])):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.json").write_text(json.dumps({**document, "data": articles}))
    mixture = f"{tmp_path}/one/train.json=0.5,{tmp_path}/two/train.json=0.1"
    return {"train_file": mixture, "predict_file": f"{tmp_path}/one/dev.json,{tmp_path}/two/dev.json"}


@pytest.mark.slow
def test_a_mixture_resumes_on_another_number_of_ranks(
    base_options: dict[str, object], two_files: dict[str, object], tmp_path: Path
) -> None:
    """Saved and evaluated after each epoch; the losses are those of the uninterrupted run, across an epoch's end."""
    given = {**base_options, **two_files, "global_batch_size": 16, "save_steps": "epoch", "eval_steps": "epoch"}
    del given["max_train_examples"], given["max_steps"]
    options = {**given, "num_train_epochs": 2, "output_dir": tmp_path / "run"}
    done = run(alone("train", *flags(**options)), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    losses_before, lines = losses(tmp_path / "run"), (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = len(losses_before)
    evaluated = [line["step"] for line in map(json.loads, lines) if "eval/f1" in line]
    assert evaluated == [steps // 2, steps] and {"one/dev.json", "two/dev.json"} <= {
        key.removeprefix("eval/").rpartition("/")[0] for key in json.loads(lines[-1])
    }
    other = run(
        alone("train", *flags(**{**options, "train_file": str(options["train_file"]).replace("0.1", "0.2")})), tmp_path
    )
    assert other.returncode == 2 and "0.1, is " in other.stderr and "--resume_with_changes" in other.stderr
    _forget_after(tmp_path / "run", f"checkpoint-{steps // 2}")
    again = run(by_torchrun(2, "train", *flags(**options)), tmp_path)
    assert again.returncode == 0 and f"step {steps // 2} of {steps}" in again.stdout, again.stderr[-3000:]
    np.testing.assert_allclose(losses(tmp_path / "run"), losses_before, rtol=1e-4)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert list(metrics["files"]) == ["one/dev.json", "two/dev.json"] and "loss" in metrics["files"]["one/dev.json"]
    assert "| mean of the files |" in (tmp_path / "run/README.md").read_text()


def _forget_after(output_dir: Path, checkpoint: str) -> None:
    for path in output_dir.glob("checkpoint-*"):
        if path.name != checkpoint:
            shutil.rmtree(path)
    (output_dir / "model.safetensors").unlink()
    run_file = output_dir / "run.json"
    run_file.write_text(json.dumps({**json.loads(run_file.read_text()), "status": "running"}))


def test_the_run_record_holds_settings_versions_and_checksums(trained: Path) -> None:
    record = json.loads((trained / "run.json").read_text())
    assert record["status"] == "finished" and record["options"]["learning_rate"] == 1e-3
    assert record["ds_config"]["zero_optimization"]["stage"] == 2 and "auto" not in json.dumps(record["ds_config"])
    for purpose in ("train", "evaluate"):
        assert record["data"][purpose]["questions"]["usable"] > 0 and len(record["data"][purpose]["fingerprint"]) == 64
    assert record["software"]["versions"]["torch"] == version("torch")
    assert record["hardware"]["ranks"] == 2 and record["hardware"]["cores"] > 0
    assert record["throughput"]["questions_per_second"] > 0 and record["peak_memory"]["host_gib"] > 0.1
    assert {"features", "loading", "training", "evaluation"} <= record["seconds"].keys()
    assert record["metrics"] == json.loads((trained / "metrics.json").read_text())
    assert {"model.safetensors", "config.json", "predictions.json", "README.md"} <= record["files"].keys()
    for name, digest in record["files"].items():
        assert hashlib.sha256((trained / name).read_bytes()).hexdigest() == digest
