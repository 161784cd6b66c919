"""Pages with known content for the browser: an evaluation of two files, two runs compared, and a sweep."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.decoding.predictions import Prediction, columns_of
from qa_deepspeed.qa.metrics.compare import explain
from qa_deepspeed.qa.metrics.prediction_files import GoldFile, read_gold
from qa_deepspeed.qa.metrics.settings import RunScores, compare_with_best, summarize
from qa_deepspeed.qa.report.comparison import SystemAnswers, comparison_page
from qa_deepspeed.qa.report.page import page
from qa_deepspeed.qa.report.result import EvaluationResult, ResultBuilder
from qa_deepspeed.qa.report.sweep_page import sweep_page

PLACES = ("Rome", "Oslo", "New York", "Köln", "São Paulo")
WORDS = ("Who", "Where", "When", "How many", "Why")
ABOUT = {
    "Model": "models/bert-base-uncased, fine-tuned",
    "Data": "data/news.json,data/wiki.json",
    "Date": "2026-01-02 03:04 UTC",
    "Steps": "800 of 800",
    "Command": "qa-deepspeed train --model_name_or_path models/bert-base-uncased --train_file data/train.json "
    "--predict_file data/news.json,data/wiki.json --version_2_with_negative true --output_dir runs/mine",
}


def context_of(number: int) -> str:
    """A paragraph of four questions; every third one has letters of two UTF-16 units before its names."""
    first, second = PLACES[number % 5], PLACES[(number + 2) % 5]
    letters = "😀𝒳 " if number % 3 == 0 else ""
    return f"{letters}In {1900 + number} Ann Lee flew from {first} to {second}. " + "Nothing else is known of her. " * 8


def evaluation(questions: int = 200) -> EvaluationResult:
    """Answers of every class, in two files, with confidences from 0 to 1; the same at every call."""
    chance = random.Random(1)
    examples, predictions = [], []
    for i in range(questions):
        context = context_of(i // 4)
        gold, wrong = "Ann Lee", PLACES[(i // 4) % 5]
        start, elsewhere = context.index(gold), context.index(wrong)
        answers = () if i % 4 == 3 else (Answer(gold, start), Answer(gold, start), Answer("Lee", start + 4))
        if i % 20 == 0:
            answers = (Answer("nn Le", start + 1),)
        examples.append(Example(f"question-{i}", f"{WORDS[i % 5]} is number {i}?", context, answers))
        kinds = [(gold, start)] * 6 + [("", -1), (wrong, elsewhere), ("Ann", start), ("Lee flew", start + 4)]
        text, place = ("", -1) if not answers and chance.random() < 0.7 else chance.choice(kinds)
        probability = round(chance.random(), 3)
        rest = [("her", 0.0, 1.0, 0.0, -1), ("", (1 - probability) / 2, 0.0, 0.0, -1)]
        nbest = columns_of([(text, probability, 2.0, 1.0, place), *rest])
        predictions.append(Prediction(examples[-1].example_id, text, nbest, chance.gauss(0, 4)))
    file_of_question = np.arange(questions) * 2 // questions
    builder = ResultBuilder(True, "en", questions, None, ("news.json", "wiki.json"), file_of_question)
    list(builder.observe(examples, predictions, [1 + i % 2 for i in range(questions)]))
    result = builder.result(builder.metrics())
    assert result is not None
    return result


def write_evaluation_page(folder: Path, result: EvaluationResult) -> Path:
    """report.html of an evaluation."""
    path = folder / "report.html"
    path.write_text(page(result.report, result.questions, "Evaluation on news.json and wiki.json", ABOUT), "utf-8")
    return path


def gold_of_forty(folder: Path) -> GoldFile:
    """40 questions, one a paragraph, each answered by "Ann Lee"."""
    paragraphs = [
        {
            "context": context_of(i),
            "qas": [
                {
                    "id": f"q{i}",
                    "question": f"{WORDS[i % 5]} is number {i}?",
                    "answers": [{"text": "Ann Lee", "answer_start": context_of(i).index("Ann Lee")}],
                }
            ],
        }
        for i in range(40)
    ]
    gold_file = folder / "gold.json"
    gold_file.write_text(json.dumps({"version": "2.0", "data": [{"paragraphs": paragraphs}]}), "utf-8")
    return read_gold(str(gold_file))


def write_comparison_page(folder: Path) -> Path:
    """compare.html of two runs on 40 questions: the second wins eight and loses four."""
    gold = gold_of_forty(folder)
    a = {f"q{i}": "Ann Lee" if i >= 8 else "her" for i in range(40)}
    b = {f"q{i}": "Ann Lee" if i < 36 else "" for i in range(40)}
    systems = SystemAnswers("small", a), SystemAnswers("large", b)
    settings = [["learning_rate", "1e-05", "3e-05"], ["identity.steps", "100", "200"]]
    about = {"Runs": "runs/small and runs/large", "Data": "gold.json", "Date": "2026-01-02 03:04 UTC"}
    document = comparison_page(gold, systems, explain(gold, a, b, "en"), "en", about, settings)
    path = folder / "compare.html"
    path.write_text(document, "utf-8")
    return path


def write_sweep_page(folder: Path) -> Path:
    """sweep.html of two settings with two runs each."""
    gold = gold_of_forty(folder)
    runs = []
    for setting, seed, right in (("1e-05", 1, 36), ("1e-05", 2, 34), ("5e-05", 1, 20), ("5e-05", 2, 12)):
        answers = {f"q{i}": "Ann Lee" if i < right else "her" for i in range(40)}
        metrics = {"f1": 2.5 * right, "exact": 2.5 * right}
        name = f"learning_rate-{setting}_seed-{seed}"
        runs.append(RunScores(name, f"learning_rate {setting}, weight_decay 0.1", metrics, answers))
    rows = summarize(runs, "f1")
    tests = compare_with_best(gold, runs, rows, "en", "f1")
    about = {"Runs": "4 of 4 in runs/sweep", "Data": "gold.json", "Date": "2026-01-02 03:04 UTC"}
    path = folder / "sweep.html"
    path.write_text(sweep_page(gold, runs, rows, tests, "en", "f1", about), "utf-8")
    return path
