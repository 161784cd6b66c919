"""The evaluation's forward beside transformers.Trainer's, on the same model and windows, in one process, by turns.

    OMP_NUM_THREADS=1 python tests/bench/bench_evaluate_forward.py [--file en-v1-dev.json] [--questions N] [--repeats 3]

`peer` is Trainer with its defaults: every row padded to 384, rows in the file's order. `peer tuned` pads to the longest
row of the batch and predicts the rows sorted by length, putting its logits into the file's order at the end (Trainer's
own group_by_length, which shuffles, would lose which row they are of). Ours is `gather_evaluation`: batches of similar
length, reduction to candidates included; the peers return full logits, whose reduction is part of their decoding. All
have 16 rows a batch. Wall clock and processor seconds are given; the latter leave out waiting for a core that other
work has. A ratio is the median of the turns' ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets
import numpy as np
import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, default_data_collator

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.facts import model_facts
from qa_deepspeed.models.heads import head_of
from qa_deepspeed.models.loading import load_model, quiet_transformers
from qa_deepspeed.qa.features.batching import make_batch
from qa_deepspeed.qa.features.families import model_columns
from qa_deepspeed.qa.features.sampler import evaluation_batches
from qa_deepspeed.training.evaluation.evaluation_forward import gather_evaluation
from qa_deepspeed.training.features import load_features
from tests.bench.bench_decode import LENGTH, OVERLAP, load_peer
from tests.paths import DATA, MINILM

ROWS = 16


def ours(options, facts, store, model, folder, device):
    layout, head = facts.layout(model_columns(model, facts.config), 0), head_of(model, False)

    def forward(inputs):
        with torch.inference_mode():
            return model(**inputs)

    return lambda: gather_evaluation(forward, head, device, store, layout, options, folder)


def peers(peer, path, questions, tokenizer, model, folder, device, tuned):
    """The number of windows, and a function that predicts them and returns the logits in the file's order."""
    args = argparse.Namespace(max_seq_length=LENGTH, doc_stride=OVERLAP, tuned=tuned)
    examples = peer.read_squad(str(path), questions)
    features = examples.map(
        peer.make_featurizer(tokenizer, args, False), batched=True, remove_columns=examples.column_names
    ).remove_columns(["example_id", "offset_mapping"])
    order = np.arange(len(features))
    if tuned:
        order = np.argsort([len(ids) for ids in features["input_ids"]], kind="stable")
        features = features.select(order).flatten_indices()
    training = TrainingArguments(
        output_dir=str(folder),
        per_device_eval_batch_size=ROWS,
        report_to="none",
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
    )
    collator = DataCollatorWithPadding(tokenizer) if tuned else default_data_collator
    trainer = Trainer(model=model, args=training, data_collator=collator, processing_class=tokenizer)
    place_of_row = np.argsort(order)
    return len(features), lambda: [logits[place_of_row] for logits in trainer.predict(features).predictions[:2]]


def padding(store, layout):
    """Share of the padded places that hold no token."""
    places = 0
    for rows in evaluation_batches(store.lengths, ROWS, 0, 1):
        places += int(np.prod(make_batch(store.take, rows, layout).inputs["input_ids"].shape))
    return 1 - int(store.lengths.sum()) / places


def in_turns(ways, repeats):
    """Wall-clock and processor seconds of every turn, `[repeats]` pairs by name."""
    turns = {name: [] for name in ways}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        for _ in range(repeats):
            for name, way in ways.items():
                began = time.perf_counter(), time.process_time()
                way()
                turns[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return turns


def table(turns):
    """Lines of a table: seconds of every turn, and how many times as fast ours is by both clocks."""
    lines = ["| | seconds, by turns | ours is faster by | by processor time |", "|---|---|---|---|"]
    for name, measured in turns.items():
        ratios = zip(measured, turns["ours"], strict=True)
        faster = [
            statistics.median(clocks) for clocks in zip(*((a / c, b / d) for (a, b), (c, d) in ratios), strict=True)
        ]
        seconds = ", ".join(f"{wall:.1f}" for wall, _ in measured)
        lines.append(f"| {name} | {seconds} | {faster[0]:.2f} | {faster[1]:.2f} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="en-v1-dev.json", help="a gold file of the shared data, v1.1")
    parser.add_argument("--questions", type=int, help="the first so many only")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    datasets.disable_progress_bars()
    quiet_transformers(False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = RunOptions(
            model_name_or_path=str(MINILM),
            predict_file=str(DATA / arguments.file),
            cache_dir=str(folder),
            max_eval_examples=arguments.questions,
            max_seq_length=LENGTH,
            doc_stride=OVERLAP,
            doc_stride_is="overlap",
            per_gpu_eval_batch_size=ROWS,
        )
        facts = model_facts(options)
        store = load_features(options, "evaluate", facts)
        model = load_model(options, facts.config)[0].to(device).eval()
        shared = DATA / arguments.file, arguments.questions, facts.tokenizer, model, folder, device
        ways = {"ours": ours(options, facts, store, model, folder, device)}
        for name, tuned in (("peer tuned", True), ("peer", False)):
            rows, ways[name] = peers(load_peer(), *shared, tuned)
            assert rows == len(store), "both systems forward the same windows"
        turns = in_turns(ways, arguments.repeats)
        layout = facts.layout(model_columns(model, facts.config), 0)
        figures = {
            "features": len(store),
            "device": device.type,
            "padding_share": round(padding(store, layout), 3),
            "peer_padding_share": round(1 - int(store.lengths.sum()) / (len(store) * LENGTH), 3),
        }
    print("\n".join(table(turns)))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
