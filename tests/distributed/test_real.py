"""The main job on real questions with a real pretrained model, short: two ranks, ZeRO-2, bfloat16."""

import json
from pathlib import Path

import pytest

from tests.distributed.launching import alone, by_deepspeed, flags, run
from tests.paths import DATA, MINILM, needs_real_data, needs_real_model

pytestmark = [pytest.mark.distributed, pytest.mark.real, needs_real_data, needs_real_model]


def test_real_questions_end_to_end(tmp_path: Path) -> None:
    """Answers are slices of their contexts, and `score` finds in the files what training said at its end."""
    options = {
        "model_name_or_path": MINILM,
        "train_file": DATA / "en-v2-train.json",
        "predict_file": DATA / "en-v2-dev.json",
        "output_dir": tmp_path / "run",
        "cache_dir": tmp_path / "cache",
        "version_2_with_negative": True,
        "bf16": True,
        "max_train_examples": 128,
        "max_eval_examples": 60,
        "max_steps": 6,
        "learning_rate": 1e-4,
        "logging_steps": 3,
        "deepspeed_config": "zero2",
        "do_eval": True,
        "save_steps": 0,
    }
    done = run(by_deepspeed(2, "train", *flags(**options)), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "12,404 usable, 0 rejected" in done.stdout and "fresh weights" in done.stdout
    answers = json.loads((tmp_path / "run/predictions.json").read_text())
    gold = json.loads((DATA / "en-v2-dev.json").read_text())
    asked = [(qa, p["context"]) for a in gold["data"] for p in a["paragraphs"] for qa in p["qas"]][:60]
    assert list(answers) == [qa["id"] for qa, _ in asked]
    assert all(answers[qa["id"]] in context for qa, context in asked)

    kept = {qa["id"] for qa, _ in asked}
    for article in gold["data"]:
        for paragraph in article["paragraphs"]:
            paragraph["qas"] = [qa for qa in paragraph["qas"] if qa["id"] in kept]
    (tmp_path / "gold.json").write_text(json.dumps(gold))
    scored = run(
        alone(
            "score",
            "gold.json",
            "run/predictions.json",
            "--null_odds",
            "run/null_odds.json",
            "--null_odds_threshold",
            "none",
            "--json",
        ),
        tmp_path,
    )
    assert scored.returncode == 0, scored.stderr
    scored_again = json.loads(scored.stdout.splitlines()[-1])
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    best = ("best_exact", "best_f1", "best_f1_thresh", "tuned_f1", "tuned_f1_thresh", "crossfit_exact", "crossfit_f1")
    for name in ("exact", "f1", "total", "HasAns_f1", "NoAns_f1", *best):
        assert scored_again[name] == pytest.approx(metrics[name], abs=1e-9), name
