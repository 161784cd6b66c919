"""Questions answered per second: QuestionAnswerer against the pipeline of Transformers 4, side by side.

    python tests/bench/bench_predict.py --reader runs/mine --questions en-v1-dev.json --transformers_4 v4/bin/python

Each takes its turn in a process of its own, several times; loading and a first answer are not counted, and the best
turn of each counts. Both compute in float32, with as many threads. The pipeline gets batches of 1, its default, and the
others of --old_batch_sizes; the fastest counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parent.parent / "contract" / "old_pipeline.py"
REPOSITORY = SCRIPT.parent.parent.parent


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", help="folder of a trained model")
    parser.add_argument("--questions", help="SQuAD JSON")
    parser.add_argument("--transformers_4", help="a Python that has transformers 4.57.6")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="ask only every so many-th question")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--old_batch_sizes", default="1")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        sys.path.insert(0, str(REPOSITORY))
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
    warm = {"every": len(pairs)}
    counted = len(pairs[:: arguments.every])
    best: dict[tuple[str, str], float] = {}
    for _ in range(arguments.turns):
        sizes = [int(size) for size in arguments.old_batch_sizes.split(",")]
        calls = [warm, *({"every": arguments.every, "batch_size": size} for size in sizes)]
        old = theirs(arguments.transformers_4, {**work, "calls": [dict(call) for call in calls]})[1:]
        new = in_a_process({**work, "calls": [dict(warm), {"every": arguments.every}]})[1]
        named = [(f"pipeline, batches of {size}", result) for size, result in zip(sizes, old, strict=True)]
        for name, result in [*named, ("QuestionAnswerer", new)]:
            for kind in ("seconds", "processor_seconds"):
                key = (name, kind)
                best[key] = min(result[kind], best.get(key, float("inf")))
        pairs_of_answers = zip(old[0]["answers"], new["answers"], strict=True)
        same = sum(a["answer"] == b["answer"] for a, b in pairs_of_answers)
        print(f"equal answers: {same} of {counted}", flush=True)
    for kind, clock in (("seconds", "elapsed"), ("processor_seconds", "of processor time")):
        rates = {name: counted / seconds for (name, of), seconds in best.items() if of == kind}
        for name, rate in rates.items():
            print(f"{name}: {rate:.1f} questions a second {clock}")
        fastest_old = max(rate for name, rate in rates.items() if name.startswith("pipeline"))
        print(f"QuestionAnswerer against the pipeline: {rates['QuestionAnswerer'] / fastest_old:.2f} times")


if __name__ == "__main__":
    main()
