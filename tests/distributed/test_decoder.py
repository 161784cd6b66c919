"""A decoder without any pretraining learns to read the generated corpus: `launch/test.sh -m slow -k decoder`."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForQuestionAnswering

from tests.distributed.launching import alone, by_deepspeed, flags, run
from tests.paths import REPOSITORY

SIZE = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
    "initializer_range": 0.06,
}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_small_qwen2_learns_to_read_questions_of_held_out_articles(tmp_path: Path) -> None:
    """As the quickstart trains its encoder, but for the model: each token sees only what stands before it."""
    made = run(alone("sample", "quickstart/sample"), tmp_path)
    assert made.returncode == 0, made.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "quickstart/sample/model")
    torch.manual_seed(42)
    model = Qwen2ForQuestionAnswering(Qwen2Config(vocab_size=len(tokenizer), **SIZE))
    model.save_pretrained(tmp_path / "decoder")
    settings = yaml.safe_load((REPOSITORY / "launch" / "quickstart.yaml").read_text())
    # beside a Qwen2 config, Transformers would read the words' tokenizer as Qwen2's, by bytes
    settings |= {
        "model_name_or_path": "decoder",
        "tokenizer_name": settings["model_name_or_path"],
        "num_train_epochs": 0.75,
    }
    trained = run(by_deepspeed(2, "train", *flags(**settings)), tmp_path)
    assert trained.returncode == 0, trained.stdout[-3000:] + trained.stderr[-6000:]

    metrics = json.loads((tmp_path / "quickstart/run/metrics.json").read_text())
    print(trained.stdout[-2000:])
    assert metrics["NoAns_total"] >= metrics["total"] / 4
    assert metrics["HasAns_f1"] > 80
    assert metrics["NoAns_f1"] > 80
