"""Kernels that only a GPU runs: DeepSpeed's compiled optimizers, and every attention there is, beside torch's own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForQuestionAnswering
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from qa_deepspeed.engine.ds_config import shipped
from tests.distributed.launching import losses, run_many
from tests.gpu.on_gpu import ON_GPU, SHORT_RUN, gpu_marks, train_at_once

pytestmark = gpu_marks

COMPILED = {"fused_adam": "zero2", "cpu_adam": "zero2_offload"}
"""DeepSpeed's operator that an `optimizer` section of type AdamW gives at this config."""
SECTION = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}

PACKAGES = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
MODELS = ("encoder", "decoder")


@pytest.fixture(scope="module")
def optimized(base_options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each compiled optimizer and one of the default; what was compiled is in extensions/."""
    folder: Path = tmp_path_factory.mktemp("optimizers")
    runs = {"default": {**base_options, **SHORT_RUN, "deepspeed_config": "zero2"}}
    for operator, name in COMPILED.items():
        config = json.loads(shipped()[name].read_text()) | {"optimizer": SECTION}
        (folder / f"{operator}.json").write_text(json.dumps(config))
        runs[operator] = {**runs["default"], "deepspeed_config": str(folder / f"{operator}.json")}
    # DeepSpeed 0.19.8 cannot read an outer list of architectures with a letter in it, such as 9.0a
    here = ".".join(map(str, torch.cuda.get_device_capability()))
    run_many(1, runs, folder, **ON_GPU, TORCH_EXTENSIONS_DIR=str(folder / "extensions"), TORCH_CUDA_ARCH_LIST=here)
    return folder


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here, which compiles DeepSpeed's optimizers")
@pytest.mark.parametrize("operator", COMPILED)
def test_compiled_optimizers_update_as_torch_does(optimized: Path, operator: str) -> None:
    assert list((optimized / "extensions").rglob(f"{operator}.so"))
    np.testing.assert_allclose(losses(optimized / operator), losses(optimized / "default"), rtol=1e-3)


def attentions(precision: str) -> list[str]:
    """Those that can be had here; flash attention computes in half precision only."""
    return ["sdpa", "eager", *(name for name, found in PACKAGES.items() if precision == "bf16" and found())]


@pytest.fixture(scope="module")
def attended(base_options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each attention, as MODEL-PRECISION/ATTENTION; `unset` where no option names one."""
    folder: Path = tmp_path_factory.mktemp("attention")
    encoder = str(base_options["model_name_or_path"])
    size = json.loads((Path(encoder) / "config.json").read_text())
    torch.manual_seed(5)
    shape = {key: size[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = Qwen2Config(num_key_value_heads=2, intermediate_size=256, initializer_range=0.06, **shape)
    Qwen2ForQuestionAnswering(config).save_pretrained(folder / "model")
    model_of = {
        "encoder": {"model_name_or_path": encoder},
        "decoder": {"model_name_or_path": str(folder / "model"), "tokenizer_name": encoder},
    }
    launches = {}
    for model in MODELS:
        for precision, flag in (("fp32", {}), ("bf16", {"bf16": True})):
            options = {**base_options, **SHORT_RUN, **flag, **model_of[model], "deepspeed_config": "zero1"}
            launches[f"{model}-{precision}"] = {"unset": options} | {
                name: {**options, "attn_implementation": name} for name in attentions(precision)
            }
    train_at_once(launches, folder)
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_attentions_agree_in_float32(attended: Path, model: str) -> None:
    folder = attended / f"{model}-fp32"
    for name in ("eager", "unset"):
        np.testing.assert_allclose(losses(folder / name), losses(folder / "sdpa"), rtol=1e-3)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["unset", "eager", *PACKAGES])
def test_attentions_agree_in_half_precision(attended: Path, model: str, name: str) -> None:
    """Step by step until rounding has grown, then in what they learn."""
    if name in PACKAGES and not PACKAGES[name]():
        pytest.skip(f"the package of {name} is not installed")
    folder = attended / f"{model}-bf16"
    found, expected = losses(folder / name), losses(folder / "sdpa")
    np.testing.assert_allclose(found[:5], expected[:5], rtol=2e-2)
    assert found[-5:].mean() < found[:3].mean()
    assert abs(found[-5:].mean() - expected[-5:].mean()) < 0.5
