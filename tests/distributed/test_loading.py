"""Under ZeRO-3 two ranks load every kind of checkpoint as `from_pretrained` does, each holding its own share only."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.distributed.launching import free_port, run
from tests.paths import REPOSITORY

pytestmark = pytest.mark.distributed

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
}
LARGE: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
}


def bert(folder: Path) -> None:
    BertForQuestionAnswering(BertConfig(**SMALL)).save_pretrained(folder)


def sharded(folder: Path) -> None:
    BertForQuestionAnswering(BertConfig(**SMALL)).save_pretrained(folder, max_shard_size="2KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def without_head(folder: Path) -> None:
    """Names without the prefix of the base model; the head is drawn by seed."""
    BertModel(BertConfig(**SMALL)).save_pretrained(folder)


def of_old_names(folder: Path) -> None:
    """LayerNorm.gamma and .beta, and a weight that the model has no use for."""
    bert(folder)
    path = folder / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in load_file(path).items()
    }
    save_file(old | {"cls.predictions.bias": torch.zeros(61)}, path, metadata={"format": "pt"})


def halved(folder: Path) -> None:
    BertForQuestionAnswering(BertConfig(**SMALL)).bfloat16().save_pretrained(folder)


def tied(folder: Path) -> None:
    """One embedding in three places, written once."""
    size = {
        "vocab_size": 61,
        "d_model": 12,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 20,
        "decoder_ffn_dim": 20,
    }
    BartForConditionalGeneration(BartConfig(**size)).save_pretrained(folder)


def decoder(folder: Path) -> None:
    Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=1, **SMALL)).save_pretrained(folder)


def no_safetensors(folder: Path) -> None:
    """torch's own format: Transformers loads it."""
    model = BertForQuestionAnswering(BertConfig(**SMALL))
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


CASES = (bert, sharded, without_head, of_old_names, halved, tied, decoder, no_safetensors)


def test_shares_are_those_of_from_pretrained_and_memory_is_a_share(tmp_path: Path) -> None:
    """Each rank asserts (loading.py says what)."""
    torch.manual_seed(3)
    for case in CASES:
        case(tmp_path / case.__name__)
    BertForQuestionAnswering(BertConfig(**LARGE)).save_pretrained(tmp_path / "large", max_shard_size="30MB")
    command = ["torchrun", "--nproc_per_node", "2", "--master_port", free_port(), "-m", "tests.distributed.loading"]
    done = run([*command, str(tmp_path), "large", *(case.__name__ for case in CASES)], REPOSITORY)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    print(done.stdout)
