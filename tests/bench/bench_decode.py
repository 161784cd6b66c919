"""Decoding speed beside the peer's, on the same questions, windows and logits, in one process and one run.

    OMP_NUM_THREADS=1 python tests/bench/bench_decode.py [--file en-v1-dev.json] [--repeats 5]

The logits are random (seeded normal, deviation 3): no decoder's work depends on what they say, only on how many spans
there are. The peer decodes full logits (its `decode`, files written as its `main` writes them). Ours first reduces each
row to its candidates (`spans.best_spans`, part of an evaluation's forward on the device, here on one CPU thread), in
the micro-batches of an evaluation (rows of similar length, padded to the longest of the micro-batch), puts them into
the order of the features, and then decodes them (`exact.decode`). The table has both: with the reduction, which is the
same work as the peer's, and without it, the second step alone. The ways take turns, --repeats times, each turn
repeating a way for half a second; a ratio is the median of the turns' ratios, since the speed of a shared core changes
from second to second.
"lists" keeps all n-best lists, as the peer does; "streamed" makes them and lets them go, as writing does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets
import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

from qa_deepspeed.qa.cache.prepare import prepare_features
from qa_deepspeed.qa.data.reading import DataSource
from qa_deepspeed.qa.decoding.exact import Candidates, DecodeSettings, decode, write_predictions
from qa_deepspeed.qa.decoding.spans import best_spans
from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.qa.features.families import family_of
from qa_deepspeed.qa.features.sampler import evaluation_batches, padded_length
from tests.paths import DATA, MINILM, SHARED

LENGTH, OVERLAP = 384, 128
ROWS_OF_A_MICRO_BATCH = 16
SECONDS_OF_A_TURN = 0.5


def load_peer():
    specification = importlib.util.spec_from_file_location("peer", SHARED / "peers" / "hf_trainer_qa.py")
    peer = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(peer)
    return peer


def peer_inputs(peer, path, tokenizer, settings):
    args = argparse.Namespace(
        max_seq_length=LENGTH,
        doc_stride=OVERLAP,
        tuned=False,
        n_best_size=settings.n_best_size,
        max_answer_length=settings.max_answer_length,
        version_2_with_negative=settings.version_2_with_negative,
        null_score_diff_threshold=settings.null_score_diff_threshold,
    )
    examples = peer.read_squad(str(path))
    features = examples.map(
        peer.make_featurizer(tokenizer, args, False), batched=True, remove_columns=examples.column_names
    )
    return args, examples, features


def cut_micro_batches(start_logits, end_logits, store):
    """Feature ids of each micro-batch of an evaluation, with (logits, bounds) as the forward has them."""
    batches = []
    for numbers in evaluation_batches(store.lengths, ROWS_OF_A_MICRO_BATCH, 0, 1):
        rows, width = store.take(numbers), padded_length(int(store.lengths[numbers].max()))
        logits = (start_logits[numbers, :width], end_logits[numbers, :width])
        bounds = (rows.context_begin, rows.context_end, rows.context_end)
        batches.append((numbers, [torch.from_numpy(np.ascontiguousarray(array)) for array in (*logits, *bounds)]))
    return batches


def take_candidates(batches, null_logits, settings):
    """The candidates of all rows, a micro-batch at a time, in the order of the features."""
    with torch.inference_mode():
        kept = [best_spans(*batch, settings.n_best_size, settings.max_answer_length) for _, batch in batches]
    columns = [torch.cat(column).numpy() for column in zip(*kept, strict=True)]
    numbers = np.concatenate([numbers for numbers, _ in batches])
    dtypes = (np.int32, np.int32, np.float32, np.float32)
    ordered = [np.empty(column.shape, dtype) for column, dtype in zip(columns, dtypes, strict=True)]
    for target, column in zip(ordered, columns, strict=True):
        target[numbers] = column
    return Candidates(np.arange(len(numbers)), *ordered, *null_logits)


def in_turn(ways, repeats):
    """Seconds of each way, a run on the mean of every turn; `[repeats]` by name."""
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            elapsed, runs = 0.0, 0
            while elapsed < SECONDS_OF_A_TURN:
                began = time.perf_counter()
                made = way()
                elapsed += time.perf_counter() - began
                del made  # letting go of it does not count
                runs += 1
            seconds[name].append(elapsed / runs)
    return seconds


PEER_OF = {
    "ours, lists": "peer, lists",
    "ours, streamed": "peer, lists",
    "ours, files written": "peer, files written",
    "without the reduction, lists": "peer, lists",
    "without the reduction, streamed": "peer, lists",
    "without the reduction, files written": "peer, files written",
}


def table(seconds, questions):
    """Lines of a table: questions a second (median), and how many times as fast as the peer with the same output."""
    lines = ["| | questions/s | faster than the peer |", "|---|---|---|"]
    for way, turns in seconds.items():
        faster = ""
        if way in PEER_OF:
            ratios = (peer / own for own, peer in zip(turns, seconds[PEER_OF[way]], strict=True))
            faster = f"{statistics.median(ratios):.1f}"
        lines.append(f"| {way} | {questions / statistics.median(turns):,.0f} | {faster} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="en-v2-dev.json", help="a gold file of the shared data")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    path, tokenizer, peer = DATA / arguments.file, AutoTokenizer.from_pretrained(MINILM), load_peer()
    settings = DecodeSettings(version_2_with_negative="v2" in arguments.file)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        args, examples, features = peer_inputs(peer, path, tokenizer, settings)
        source = DataSource((str(path),), "evaluate", settings.version_2_with_negative)
        family = family_of(AutoConfig.from_pretrained(MINILM), tokenizer)
        lengths = FeatureSettings(max_seq_length=LENGTH, doc_stride=OVERLAP, doc_stride_is="overlap")
        store = prepare_features(source, tokenizer, family, lengths, folder / "cache")
        assert len(store) == len(features), "both systems decode the same windows"
        generator = np.random.default_rng(0)
        logits = [generator.normal(0, 3, (len(store), LENGTH)).astype(np.float32) for _ in range(2)]
        batches, null_logits = cut_micro_batches(*logits, store), [one[:, 0] for one in logits]
        candidates = take_candidates(batches, null_logits, settings)

        def write_peer():
            answers, nbest = peer.decode(examples, features, logits, args)
            for name, value in (("predictions.json", answers), ("nbest_predictions.json", nbest)):
                with open(folder / name, "w", encoding="utf-8") as handle:
                    json.dump(value, handle)

        def ours():
            return decode(take_candidates(batches, null_logits, settings), store, settings)

        def reduced():
            return decode(candidates, store, settings)

        seconds = in_turn(
            {
                "peer, lists": lambda: peer.decode(examples, features, logits, args),
                "peer, files written": write_peer,
                "ours, lists": lambda: list(ours()),
                "ours, streamed": lambda: deque(ours(), maxlen=0),
                "ours, files written": lambda: write_predictions(ours(), folder / "out", settings),
                "the reduction alone": lambda: take_candidates(batches, null_logits, settings),
                "without the reduction, lists": lambda: list(reduced()),
                "without the reduction, streamed": lambda: deque(reduced(), maxlen=0),
                "without the reduction, files written": lambda: write_predictions(reduced(), folder / "out", settings),
            },
            arguments.repeats,
        )
    print("\n".join(table(seconds, len(examples))))
    figures = {
        "questions": len(examples),
        "features": len(store),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cpu": platform.processor() or platform.machine(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
