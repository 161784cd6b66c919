"""Questions answered per second: QuestionAnswerer against the pipeline of Transformers 4, side by side.

    python tests/bench/bench_predict.py --reader runs/mine --questions en-v1-dev.json --transformers_4 v4/bin/python \\
        --exports runs/mine-onnx runs/mine-int8

Both compute in float32, with as many threads. --exports names folders that `export --format onnx` made of the reader:
QuestionAnswerer takes turns on them too. Without --transformers_4 the pipeline takes none.

First the pipeline's best batch size is found: it answers every --search_every-th question at each size of
--old_batch_sizes. Then the pipeline at its default of 1, the pipeline at the best size and QuestionAnswerer take turns,
each in a process of its own; loading and a first answer are not counted. A ratio is the median of the turns' ratios, by
elapsed time and by processor time. F1 is that of the questions asked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parent.parent / "contract" / "old_pipeline.py"
REPOSITORY = SCRIPT.parent.parent.parent
OURS = "QuestionAnswerer"


def ours(work: dict[str, Any]) -> list[dict[str, Any]]:
    """What old_pipeline.py does, by QuestionAnswerer."""
    import torch

    from qa_deepspeed import QuestionAnswerer

    torch.set_num_threads(work["threads"])
    answerer = QuestionAnswerer.from_pretrained(work["model"], device=work["device"], dtype="float32")
    results = []
    for call in work["calls"]:
        every = call.pop("every")
        questions, contexts = work["questions"][::every], work["contexts"][::every]
        began, used = time.perf_counter(), time.process_time()
        answers = answerer(question=questions, context=contexts, **call)
        seconds, used = time.perf_counter() - began, time.process_time() - used
        results.append({"answers": answers, "seconds": seconds, "processor_seconds": used})
    return results


def theirs(python: str, work: dict[str, Any]) -> list[dict[str, Any]]:
    """The pipeline's turn, by its own Python."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        subprocess.run(
            [python, str(SCRIPT), str(out)], input=json.dumps(work), text=True, check=True, stderr=subprocess.DEVNULL
        )
        return json.loads(out.read_text())["results"]


def in_a_process(work: dict[str, Any]) -> list[dict[str, Any]]:
    """Our turn, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        subprocess.run(
            [sys.executable, __file__, "--turn", str(out)],
            input=json.dumps(work),
            text=True,
            check=True,
            cwd=REPOSITORY,
            stderr=subprocess.DEVNULL,
        )
        return json.loads(out.read_text())


def best_batch_size(python: str, work: dict[str, Any], sizes: list[int], every: int) -> int:
    """The size at which the pipeline answers every so many-th question fastest; prints the seconds of all."""
    warm = {"every": len(work["questions"])}
    calls = [warm, *({"every": every, "batch_size": size} for size in sizes)]
    seconds = [result["seconds"] for result in theirs(python, {**work, "calls": calls})[1:]]
    for size, taken in zip(sizes, seconds, strict=True):
        print(f"pipeline, batches of {size}: {taken:.1f} s for {len(work['questions'][::every])} questions", flush=True)
    return sizes[seconds.index(min(seconds))]


def table(turns: dict[str, list[dict[str, Any]]], questions: int, f1: dict[str, float]) -> list[str]:
    """Questions a second of every turn, how many times as fast QuestionAnswerer on the reader is, and F1."""
    lines = ["| | questions/s, by turns | ours is faster by | by processor time | F1 |", "|---|---|---|---|---|"]
    for name, results in turns.items():
        rates = ", ".join(f"{questions / result['seconds']:.1f}" for result in results)
        faster = [
            statistics.median(a[clock] / b[clock] for a, b in zip(results, turns[OURS], strict=True))
            for clock in ("seconds", "processor_seconds")
        ]
        lines.append(f"| {name} | {rates} | {faster[0]:.2f} | {faster[1]:.2f} | {f1[name]:.2f} |")
    return lines


def f1_of(path: str, every: int, answers: dict[str, list[str]]) -> dict[str, float]:
    """F1 of each list of answers to every so many-th question of a file, in percent."""
    from qa_deepspeed.qa.metrics.prediction_files import read_gold
    from qa_deepspeed.qa.metrics.squad import score

    golds = read_gold(path).questions[::every]
    ids = [gold.example_id for gold in golds]
    return {name: score(golds, dict(zip(ids, texts, strict=True)))["f1"] for name, texts in answers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", help="folder of a trained model")
    parser.add_argument("--questions", help="SQuAD JSON")
    parser.add_argument("--transformers_4", help="a Python that has transformers 4.57.6")
    parser.add_argument("--exports", nargs="*", default=[], help="folders of ONNX exports of the reader")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--every", type=int, default=1, help="ask only every so many-th question")
    parser.add_argument("--search_every", type=int, default=16, help="the same while the best batch size is found")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--old_batch_sizes", default="1,2,4,8,16,32,64", help="batch sizes of the pipeline")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    if arguments.turn:
        Path(arguments.turn).write_text(json.dumps(ours(json.load(sys.stdin))))
        return
    articles = json.loads(Path(arguments.questions).read_text())["data"]
    pairs = [(q["question"], p["context"]) for a in articles for p in a["paragraphs"] for q in p["qas"]]
    work: dict[str, Any] = {
        "model": str(Path(arguments.reader).resolve()),
        "threads": arguments.threads,
        "device": arguments.device,
        "questions": [question for question, _ in pairs],
        "contexts": [context for _, context in pairs],
    }
    counted = {"every": arguments.every}
    calls: dict[str, dict[str, int]] = {}
    if arguments.transformers_4:
        sizes = [int(size) for size in arguments.old_batch_sizes.split(",")]
        best = best_batch_size(arguments.transformers_4, work, sizes, arguments.search_every)
        calls = {f"pipeline, batches of {size}": {**counted, "batch_size": size} for size in dict.fromkeys((1, best))}
    models = {OURS: work["model"]} | {
        f"{OURS} on {Path(folder).name}": str(Path(folder).resolve()) for folder in arguments.exports
    }
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in (*models, *calls)}
    for _ in range(arguments.turns):
        for name, results in turns.items():
            asked = {**work, "calls": [{"every": len(pairs)}, dict(calls.get(name, counted))]}
            if name in models:
                results.append(in_a_process({**asked, "model": models[name]})[1])
            else:
                results.append(theirs(arguments.transformers_4, asked)[1])
    answers = {name: [one["answer"] for one in results[0]["answers"]] for name, results in turns.items()}
    for name in [name for name in turns if name != OURS]:
        same = sum(a == b for a, b in zip(answers[name], answers[OURS], strict=True))
        print(f"equal answers of ours and of {name}: {same} of {len(answers[OURS])}")
    f1 = f1_of(arguments.questions, arguments.every, answers)
    print("\n".join(table(turns, len(answers[OURS]), f1)))


if __name__ == "__main__":
    main()
