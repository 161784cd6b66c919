"""Peak anonymous memory of rank 0 from the arrival of candidates to the report, at growing numbers of features.

    python tests/bench/bench_decode_memory.py [--features 10000 100000 1000000]

Each size runs in a process of its own, by the evaluation's own code after the forward: random candidates (n_best 20)
arrive a few thousand rows at a time in any order and are spilled (`RowTable`), then decoded, scored, analysed and
written (`scoring.answer_and_score`, about 2.9 GB at a million features; all is removed). Every question has one window,
four have one context, a third has no answer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.qa.decoding.exact import Candidates
from qa_deepspeed.qa.decoding.row_table import RowTable
from qa_deepspeed.training.evaluation.scoring import answer_and_score, decoder

N_BEST, ROWS, TOKENS = 20, 4096, 150
COLUMNS = {
    "feature_id": ("i8", ()),
    "start": ("i4", (N_BEST,)),
    "end": ("i4", (N_BEST,)),
    "start_logit": ("f4", (N_BEST,)),
    "end_logit": ("f4", (N_BEST,)),
    "null_start_logit": ("f4", ()),
    "null_end_logit": ("f4", ()),
}
CONTEXT = " ".join(f"word{i:03d}" for i in range(TOKENS))


class Examples:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        for i in range(self.count):
            answers = (Answer("word005 word006", 40),) if i % 3 else ()
            yield Example(f"question-{i:09d}", "what is it?", f"{CONTEXT} {i // 4:07d}", answers)

    def ids_and_contexts(self, begin, end):
        return [f"question-{i:09d}" for i in range(begin, end)], [f"{CONTEXT} {i // 4:07d}" for i in range(begin, end)]


class Store:
    files, without_gold = (), 0

    def __init__(self, example_index):
        self.example_index = example_index
        self.examples = Examples(len(example_index))

    def file_of_examples(self):
        return None

    def character_spans(self, rows, starts, ends):
        return starts.astype(np.int64) * 8, ends.astype(np.int64) * 8 + 7


def arrivals(count):
    """Random candidates, exchange by exchange."""
    generator = np.random.default_rng(0)
    firsts = np.arange(0, count, ROWS)
    for begin in generator.permutation(firsts).tolist():
        numbers = np.arange(begin, min(begin + ROWS, count))
        rows = len(numbers)
        start = generator.permuted(np.tile(np.arange(TOKENS - 5, dtype=np.int32), (rows, 1)), axis=1)[:, :N_BEST]
        score = -np.sort(-generator.normal(3, 3, (rows, N_BEST)).astype(np.float32), axis=1)
        end = start + generator.integers(0, 5, start.shape)
        values = (numbers, start, end, score / 2, score / 2, *generator.normal(4, 2, (2, rows)))
        yield dict(zip(COLUMNS, values, strict=True))


class PeakWatch:
    """The highest anonymous memory of this process while the block runs, looked at every few milliseconds."""

    def __enter__(self):
        self.peak_mib, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.wait(0.01):
            status = Path("/proc/self/status").read_text()
            self.peak_mib = max(self.peak_mib, int(status.split("RssAnon:")[1].split()[0]) / 1024)

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()


def one_size(count):
    with tempfile.TemporaryDirectory() as folder:
        with PeakWatch() as before:
            time.sleep(0.05)
        began = time.perf_counter()
        with PeakWatch() as spilling:
            table = RowTable(count, COLUMNS, Path(folder))
            for rows in arrivals(count):
                table.put(rows["feature_id"], rows)
            candidates = Candidates(**table.columns())
        with PeakWatch() as answering:
            store = Store(candidates.feature_id)
            options = RunOptions(version_2_with_negative=True, predict_file="made.json")
            predict = decoder(candidates, None, store, None, "exact")
            metrics, _ = answer_and_score(predict, store, options, False, Path(folder), None, {})
        seconds = time.perf_counter() - began
        size = (Path(folder) / "nbest_predictions.json").stat().st_size
    assert metrics["total"] == count
    figures = {
        "features": count,
        "imports_mib": round(before.peak_mib, 1),
        "while_candidates_arrive_mib": round(spilling.peak_mib, 1),
        "while_answering_mib": round(answering.peak_mib, 1),
        "questions_per_second": round(count / seconds),
        "nbest_file_mb": round(size / 1e6),
    }
    print(json.dumps(figures), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    arguments = parser.parse_args()
    if len(arguments.features) == 1:
        one_size(arguments.features[0])
        return
    for count in arguments.features:
        subprocess.run([sys.executable, __file__, "--features", str(count)], check=True)


if __name__ == "__main__":
    main()
