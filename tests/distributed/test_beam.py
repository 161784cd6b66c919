"""XLNet and XLM with beam heads, through the main job: 32 memorized questions, and equal losses on two ranks."""

import json
from pathlib import Path

import numpy as np
import pytest

from qa_deepspeed.config.run_options import RunOptions
from tests.beam_models import save_model, write_questions
from tests.distributed.launching import losses, run_many

pytestmark = pytest.mark.distributed

STEPS = 5  # the fourth is a partial batch


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every run in a folder of its name; the short ones are steps of 8 rows, the last of them partial."""
    folder = tmp_path_factory.mktemp("beam")
    write_questions(folder / "questions.json")
    common = {
        "train_file": str(folder / "questions.json"),
        "predict_file": str(folder / "questions.json"),
        "cache_dir": str(folder / "cache"),
        "version_2_with_negative": True,
        "max_seq_length": 96,
        "max_query_length": 24,
        "doc_stride": 16,
        "save_steps": 0,
        "logging_steps": 1,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "deepspeed_config": "zero0",
    }
    whole = {
        "do_eval": True,
        "max_steps": 120,
        "logging_steps": 40,
        "learning_rate": 3e-3,
        "null_score_diff_threshold": "auto",
    }
    runs = {}
    for kind in ("xlnet", "xlm"):
        save_model(kind, folder / "questions.json", folder / kind)
        model = {**common, "model_name_or_path": str(folder / kind)}
        runs[f"{kind}_whole"] = {**model, **whole}
        runs[f"{kind}_8x1"] = {**model, "max_train_examples": 29}
        runs[f"{kind}_2x4"] = {
            **model,
            "max_train_examples": 29,
            "per_gpu_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
        }
    run_many(1, runs, folder)
    return folder


@pytest.mark.parametrize("kind", ["xlnet", "xlm"])
def test_questions_are_learnt_by_heart(runs: Path, kind: str) -> None:
    metrics = json.loads((runs / f"{kind}_whole/metrics.json").read_text())
    assert metrics["total"] == 32 and min(metrics["HasAns_total"], metrics["NoAns_total"]) >= 5
    assert metrics["f1"] > 95
    assert min(metrics["HasAns_f1"], metrics["NoAns_f1"]) > 90 and metrics["untuned_f1"] > 95


@pytest.mark.parametrize(("kind", "name"), [("xlnet", "XLNetForQuestionAnswering"), ("xlm", "XLMForQuestionAnswering")])
def test_the_saved_model_names_its_class(runs: Path, kind: str, name: str) -> None:
    for run in ("whole", "2x4"):
        assert json.loads((runs / f"{kind}_{run}/config.json").read_text())["architectures"] == [name]


@pytest.mark.parametrize("kind", ["xlnet", "xlm"])
def test_losses_are_means_over_the_global_batch(runs: Path, kind: str) -> None:
    """However it is cut up, partial batches included; the steps differ from each other by far more."""
    whole, cut = losses(runs / f"{kind}_8x1"), losses(runs / f"{kind}_2x4")
    assert len(whole) == STEPS
    np.testing.assert_allclose(cut, whole, rtol=2e-5)
    assert np.abs(np.diff(whole)).min() > 1e-3


@pytest.mark.slow
def test_two_ranks_with_partitioned_weights_have_the_same_losses(runs: Path) -> None:
    two: dict[str, dict[str, object]] = {}
    for kind in ("xlnet", "xlm"):
        options = json.loads((runs / f"{kind}_8x1/training_args.json").read_text())
        changed = {"per_gpu_train_batch_size": 2, "gradient_accumulation_steps": 2, "deepspeed_config": "zero3"}
        usual = RunOptions()
        given = {
            name: value for name, value in options.items() if name != "output_dir" and value != getattr(usual, name)
        }
        two[f"{kind}_2x2x2"] = {**given, **changed}
    run_many(2, two, runs)
    for kind in ("xlnet", "xlm"):
        np.testing.assert_allclose(losses(runs / f"{kind}_2x2x2"), losses(runs / f"{kind}_8x1"), rtol=2e-5)
        config = json.loads((runs / f"{kind}_2x2x2/config.json").read_text())
        assert config["architectures"] == json.loads((runs / f"{kind}_8x1/config.json").read_text())["architectures"]
