"""Models on a GPU: the answers of the CPU, an adapter trained under ZeRO-3, and a run that resumes after preemption."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForQuestionAnswering

from qa_deepspeed.inference.answerer import QuestionAnswerer
from tests.distributed.launching import alone, flags, losses, run, run_many
from tests.gpu.on_gpu import ON_GPU, SHORT_RUN, gpu_marks

pytestmark = gpu_marks


def questions(predict_file: object, count: int) -> list[dict[str, str]]:
    """The first questions of a SQuAD file."""
    found = [
        {"question": entry["question"], "context": paragraph["context"]}
        for article in json.loads(Path(str(predict_file)).read_text())["data"]
        for paragraph in article["paragraphs"]
        for entry in paragraph["qas"]
    ]
    assert len(found) >= count
    return found[:count]


def on_both_devices(folder: Path, asked: list[dict[str, str]]) -> None:
    """Assert that GPU and CPU answer alike."""
    there, here = (QuestionAnswerer.from_pretrained(str(folder), device=device)(asked) for device in (0, -1))
    np.testing.assert_allclose([one["score"] for one in there], [one["score"] for one in here], rtol=1e-2, atol=1e-4)
    for one, other in zip(there, here, strict=True):
        assert (one["answer"], one["start"], one["end"]) == (other["answer"], other["start"], other["end"])


def test_a_gpu_answers_as_the_cpu_does(base_options: dict[str, object], tmp_path: Path) -> None:
    run_many(1, {"run": {**base_options, **SHORT_RUN, "deepspeed_config": "zero2"}}, tmp_path, **ON_GPU)
    on_both_devices(tmp_path / "run", questions(base_options["predict_file"], 40))


def test_a_decoder_trains_adapters_in_bfloat16_under_zero3(
    base_options: dict[str, object],
    tmp_path: Path,
) -> None:
    """As float32 at ZeRO-0 does; what is saved answers."""
    pytest.importorskip("peft")
    tokenizer = str(base_options["model_name_or_path"])
    torch.manual_seed(5)
    vocabulary = json.loads((Path(tokenizer) / "config.json").read_text())["vocab_size"]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
    )
    Qwen2ForQuestionAnswering(config).save_pretrained(tmp_path / "model")
    options = {
        **base_options,
        **SHORT_RUN,
        "model_name_or_path": str(tmp_path / "model"),
        "tokenizer_name": tokenizer,
        "lora_rank": 8,
        "learning_rate": 1e-2,
    }
    runs = {
        "whole": {"deepspeed_config": "zero0"},
        "half": {"deepspeed_config": "zero3", "bf16": True},
        "offloaded": {"deepspeed_config": "zero3_offload", "bf16": True},
    }
    run_many(1, {name: {**options, **extra} for name, extra in runs.items()}, tmp_path, **ON_GPU)
    expected = losses(tmp_path / "whole")
    assert expected[-5:].mean() < expected[:3].mean()
    for name in ("half", "offloaded"):
        np.testing.assert_allclose(losses(tmp_path / name)[:5], expected[:5], rtol=2e-2)
        assert abs(losses(tmp_path / name)[-5:].mean() - expected[-5:].mean()) < 0.5
    on_both_devices(tmp_path / "whole", questions(base_options["predict_file"], 20))


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_preempted_run_resumes_as_if_unbroken(
    base_options: dict[str, object],
    tmp_path: Path,
    stage: str,
    precision: str,
) -> None:
    """Ended after step 10 of 20, by taking away what came after."""
    options = {
        **base_options,
        **SHORT_RUN,
        "max_steps": 20,
        "save_steps": 10,
        "deepspeed_config": stage,
        precision: True,
        "output_dir": tmp_path / "run",
    }
    command = alone("train", *flags(**options))
    assert run(command, tmp_path, **ON_GPU).returncode == 0
    whole = losses(tmp_path / "run")
    (tmp_path / "run/checkpoint-20/manifest.json").unlink()
    (tmp_path / "run/model.safetensors").unlink()
    record = json.loads((tmp_path / "run/run.json").read_text())
    del record["json_checksum"]  # else the change would be damage
    (tmp_path / "run/run.json").write_text(json.dumps({**record, "status": "running"}))
    again = run(command, tmp_path, **ON_GPU)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "step 10 of 20" in again.stdout, again.stdout
    assert (tmp_path / "run/model.safetensors").is_file()
    np.testing.assert_allclose(losses(tmp_path / "run"), whole, rtol=1e-3)
