"""The quickstart's main job as quickstart.sh runs it, in this environment: good enough, and the questions are read."""

import json
import time

import pytest

from qa_deepspeed.qa.metrics.squad import Gold, score
from tests.distributed.launching import alone, by_deepspeed, run
from tests.paths import REPOSITORY


def swapped_within_articles(articles):
    """Gold answers where each answerable question has those of the next answerable one of its article."""
    for article in articles:
        questions = [q for paragraph in article["paragraphs"] for q in paragraph["qas"] if q["answers"]]
        for question, other in zip(questions, questions[1:] + questions[:1], strict=True):
            yield Gold(question["id"], tuple(answer["text"] for answer in other["answers"]))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_learn_to_read_questions_of_held_out_articles(tmp_path):
    began = time.perf_counter()
    made = run(alone("sample", "quickstart/sample"), tmp_path)
    assert made.returncode == 0, made.stderr
    settings = str(REPOSITORY / "launch" / "quickstart.yaml")
    trained = run(by_deepspeed(2, "train", "--config", settings), tmp_path)
    seconds = time.perf_counter() - began
    assert trained.returncode == 0, trained.stdout[-3000:] + trained.stderr[-6000:]

    metrics = json.loads((tmp_path / "quickstart/run/metrics.json").read_text())
    assert metrics["NoAns_total"] >= metrics["total"] / 4
    assert metrics["f1"] >= 85
    assert metrics["HasAns_f1"] >= 80
    assert metrics["NoAns_f1"] >= 80

    predictions = json.loads((tmp_path / "quickstart/run/predictions.json").read_text())
    articles = json.loads((tmp_path / "quickstart/sample/dev.json").read_text())["data"]
    golds = list(swapped_within_articles(articles))
    assert len(golds) == metrics["HasAns_total"]
    swapped = score(golds, predictions, version_2_with_negative=True)
    assert swapped["f1"] < 40, "another question of the article scores as well: the question was not read"
    print(f"{seconds:.0f} s, F1 {metrics['f1']:.1f}, with answers swapped {swapped['f1']:.1f}")
