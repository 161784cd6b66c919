"""Training steps on one GPU: models from MiniLM to BERT-large, 16 to 128 rows a step, ours beside Trainer by turns.

    python tests/gpu/bench_steps.py OUT [--seconds 400] [--tiny]

Every contestant is a process of its own, measured as in bench_train (equal clocks, bf16, real tokens). After each one
OUT/steps.jsonl has a line and OUT/steps.md is written anew, so that a run that is cut short leaves what it had. The
most important measurements come first; when the seconds are used up, the rest is left out and named. Models but MiniLM
have random weights. `--tiny` takes a small model, the generated corpus and the CPU: a test that the script works.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig

from qa_deepspeed.cli.data.sample import write_sample
from tests.bench.bench_train import DEV, TRAIN, environment_of, make_parser, measure
from tests.paths import MINILM

SIZES = {"bert-large": (1024, 24, 16), "bert-base": (768, 12, 12), "minilm": None}
"""Width, layers and heads of a model with random weights; None for the model of ../shared."""

CASES = [("bert-large", 16), ("minilm", 16), ("bert-base", 16), ("bert-large", 64), ("bert-large", 128)]
CASES += [("minilm", 32), ("bert-base", 32)]
CONTESTANTS = ("ours", "peer tuned", "ours without graphs", "peer")
TINY_CONTESTANTS = ("ours", "peer tuned")
STEPS = 40
"""Optimizer steps of a contestant; a row of the data is about one question."""

PHASES = ("data_ms", "forward_ms", "backward_ms", "update_ms", "mfu", "padding")


def model_folder(name: str, out: Path) -> Path:
    """The folder of a model; one with random weights is made there."""
    size = SIZES[name]
    if size is None:
        return MINILM
    folder = out / "models" / name
    if not folder.exists():
        width, layers, heads = size
        config = BertConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width
        )
        torch.manual_seed(0)
        AutoModelForQuestionAnswering.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    return folder


def drop_unanswerable(path: Path) -> None:
    """Make SQuAD v1.1 of a v2.0 file, as all contestants read it without a flag."""
    squad = json.loads(path.read_text(encoding="utf-8"))
    for article in squad["data"]:
        for paragraph in article["paragraphs"]:
            paragraph["qas"] = [question for question in paragraph["qas"] if not question["is_impossible"]]
    path.write_text(json.dumps(squad), encoding="utf-8")


def arguments_of(name: str, rows: int, tiny: bool, out: Path) -> argparse.Namespace:
    """The options of bench_train for a case."""
    steps = 6 if tiny else STEPS
    options = ["--ranks", "1", "--rows", str(rows), "--questions", str(rows * steps), "--config", "auto"]
    options += ["--logging_steps", str(steps // 2), "--peer_without_deepspeed"]
    if tiny:
        sample = out / "sample"
        if not sample.exists():
            write_sample(sample, 3, 40, 4)
            for name_of_file in ("train.json", "dev.json"):
                drop_unanswerable(sample / name_of_file)
        options += ["--length", "256"]
        data = {"model": sample / "model", "train_file": sample / "train.json", "dev_file": sample / "dev.json"}
    else:
        options += ["--gpu", "--bf16"]
        data = {"model": model_folder(name, out), "train_file": TRAIN, "dev_file": DEV}
    for key, value in data.items():
        options += [f"--{key}", str(value)]
    arguments = make_parser().parse_args(options)
    arguments.environment = environment_of(arguments)
    return arguments


def record(name: str, rows: int, who: str, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a contestant: seconds, steps and tokens; of ours also milliseconds of the phases, MFU and memory."""
    work = out / "work" / f"{name}-{rows}"
    work.mkdir(parents=True, exist_ok=True)
    arguments.cuda_graphs = "false" if who.endswith("without graphs") else "auto"
    contestant = "ours" if who.startswith("ours") else who
    found: dict[str, Any] = {"model": name, "rows": rows, "who": who, **measure(contestant, work, arguments)}
    found["ms"] = 1000 * found["seconds"] / found["steps"]
    found["tokens_per_second"] = found["tokens"] / found["seconds"]
    if who.startswith("ours"):
        lines = [json.loads(line) for line in (work / "ours" / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "speed/mfu" in line][-1]
        found |= {key: last[f"speed/{key}"] for key in PHASES}
        found["gpu_gib"] = last.get("memory/gpu_gib")
    return found


def table(records: list[dict[str, Any]], left_out: list[str]) -> str:
    """The records as Markdown, a line each; `ratio` is tokens per second of ours over those of the contestant."""
    lines = [
        "| model | rows | | ms a step | tokens/s | ratio | data, forward, backward, update | MFU | padding | GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    ours = {(one["model"], one["rows"]): one["tokens_per_second"] for one in records if one["who"] == "ours"}
    for one in records:
        ratio = ours.get((one["model"], one["rows"]), 0.0) / one["tokens_per_second"]
        phases = ", ".join(f"{one[key]:.1f}" for key in PHASES[:4]) if "mfu" in one else ""
        rest = f"{one['mfu']:.1%} | {one['padding']:.1%} | {one['gpu_gib'] or 0:.1f}" if "mfu" in one else " | | "
        lines.append(
            f"| {one['model']} | {one['rows']} | {one['who']} | {one['ms']:.1f} | {one['tokens_per_second']:,.0f} | "
            f"{ratio:.2f} | {phases} | {rest} |"
        )
    if left_out:
        lines += ["", f"Left out for want of time: {', '.join(left_out)}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure case after case until the time is used up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    began, records, left_out = time.monotonic(), [], []
    given.out.mkdir(parents=True, exist_ok=True)
    cases = [("tiny", 4)] if given.tiny else CASES
    for name, rows in cases:
        for who in TINY_CONTESTANTS if given.tiny else CONTESTANTS:
            if time.monotonic() - began > given.seconds:
                left_out.append(f"{name} {rows} {who}")
                continue
            records.append(record(name, rows, who, given.out, arguments_of(name, rows, given.tiny, given.out)))
            with (given.out / "steps.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(records[-1]) + "\n")
            (given.out / "steps.md").write_text(table(records, left_out), encoding="utf-8")
    (given.out / "steps.md").write_text(table(records, left_out), encoding="utf-8")
    print(table(records, left_out))


if __name__ == "__main__":
    main()
