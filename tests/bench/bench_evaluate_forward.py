"""The evaluation's forward beside the peer's, on the same model and windows, in one process and in turn.

    OMP_NUM_THREADS=1 python tests/bench/bench_evaluate_forward.py [--file en-v1-dev.json] [--questions N] [--repeats 3]

The peer predicts as its defaults have it: transformers.Trainer, every row padded to 384, rows in the file's order. Ours
is `gather_evaluation`: batches of similar length, reduction to candidates included. Both have 16 rows a batch. Wall
clock and processor seconds are given; the latter leave out waiting for a core that other work has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets
import numpy as np
import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.facts import model_facts
from qa_deepspeed.models.heads import head_of
from qa_deepspeed.models.loading import load_model, quiet_transformers
from qa_deepspeed.qa.features.batching import evaluation_batches, make_batch
from qa_deepspeed.qa.features.families import model_columns
from qa_deepspeed.training.evaluation_forward import gather_evaluation
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


def peers(peer, path, questions, tokenizer, model, folder, device):
    args = argparse.Namespace(max_seq_length=LENGTH, doc_stride=OVERLAP, tuned=False)
    examples = peer.read_squad(str(path), questions)
    features = examples.map(
        peer.make_featurizer(tokenizer, args, False), batched=True, remove_columns=examples.column_names
    ).remove_columns(["example_id", "offset_mapping"])
    training = TrainingArguments(
        output_dir=str(folder),
        per_device_eval_batch_size=ROWS,
        report_to="none",
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=training, data_collator=default_data_collator, processing_class=tokenizer)
    return len(features), lambda: trainer.predict(features)


def padding(store, layout):
    """Share of the padded places that hold no token."""
    places = 0
    for rows in evaluation_batches(store.lengths, ROWS, 0, 1):
        places += int(np.prod(make_batch(store.take, rows, layout).inputs["input_ids"].shape))
    return 1 - int(store.lengths.sum()) / places


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
        rows, peer_way = peers(
            load_peer(), DATA / arguments.file, arguments.questions, facts.tokenizer, model, folder, device
        )
        assert rows == len(store), "both systems forward the same windows"
        ways = {"peer": peer_way, "ours": ours(options, facts, store, model, folder, device)}
        best = {way: [float("inf")] * 2 for way in ways}
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            for _ in range(arguments.repeats):
                for way, run in ways.items():
                    began = time.perf_counter(), time.process_time()
                    run()
                    took = time.perf_counter() - began[0], time.process_time() - began[1]
                    best[way] = [min(pair) for pair in zip(best[way], took, strict=True)]
        layout = facts.layout(model_columns(model, facts.config), 0)
        figures = {
            "features": rows,
            "device": device.type,
            "peer_seconds": round(best["peer"][0], 1),
            "ours_seconds": round(best["ours"][0], 1),
            "speedup": round(best["peer"][0] / best["ours"][0], 2),
            "speedup_processor_time": round(best["peer"][1] / best["ours"][1], 2),
            "padding_share": round(padding(store, layout), 3),
            "peer_padding_share": round(1 - int(store.lengths.sum()) / (rows * LENGTH), 3),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
