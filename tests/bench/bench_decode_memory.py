"""Peak anonymous memory of decoding, scoring and writing at growing numbers of features.

    python tests/bench/bench_decode_memory.py [--features 10000 100000 1000000]

Each size runs in a process of its own: candidates (random, n_best 20) lie in files and are mapped, the prediction files
are streamed to disk (about 2.5 GB at a million features; both are removed). Every question has one window.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qa_deepspeed.qa.decode import Candidates, DecodeSettings, decode, write_predictions
from qa_deepspeed.qa.metrics import Gold, Scorer

N_BEST, ROWS, TOKENS = 20, 8192, 150
CONTEXT = " ".join(f"word{i:03d}" for i in range(TOKENS))


class Texts:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def ids_and_contexts(self, begin, end):
        return [f"question-{i:09d}" for i in range(begin, end)], [CONTEXT] * (end - begin)


class Store:
    def __init__(self, example_index):
        self.example_index = example_index
        self.examples = Texts(len(example_index))

    def character_spans(self, rows, starts, ends):
        return starts.astype(np.int64) * 8, ends.astype(np.int64) * 8 + 7


def spill(folder, count):
    """Random candidates in files, made and written a slice at a time."""
    generator = np.random.default_rng(0)
    shapes = {
        "feature_id": (np.int64, ()), "start": (np.int32, (N_BEST,)), "end": (np.int32, (N_BEST,)),
        "start_logit": (np.float32, (N_BEST,)), "end_logit": (np.float32, (N_BEST,)), "null_score": (np.float32, ()),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in shapes}
        for begin in range(0, count, ROWS):
            rows = min(ROWS, count - begin)
            start = generator.permuted(np.tile(np.arange(TOKENS - 5, dtype=np.int32), (rows, 1)), axis=1)[:, :N_BEST]
            score = -np.sort(-generator.normal(3, 3, (rows, N_BEST)).astype(np.float32), axis=1)
            end = start + generator.integers(0, 5, start.shape)
            null_score = generator.normal(8, 3, rows)
            columns = (np.arange(begin, begin + rows), start, end, score / 2, score / 2, null_score)
            for (name, (kind, _)), column in zip(shapes.items(), columns, strict=True):
                column.astype(kind).tofile(files[name])
    mapped = {
        name: np.memmap(folder / name, kind, "r", shape=(count, *shape)) for name, (kind, shape) in shapes.items()
    }
    return Candidates(**mapped)


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
        candidates = spill(Path(folder), count)
        store, settings = Store(candidates.feature_id), DecodeSettings(version_2_with_negative=True)
        scorer = Scorer(version_2_with_negative=True)
        golds = (Gold(f"question-{i:09d}", ("word005 word006",)) for i in range(count))
        began = time.perf_counter()
        with PeakWatch() as writing:
            write_predictions(scorer.observe(decode(candidates, store, settings), golds), Path(folder), settings)
        with PeakWatch() as summing:
            metrics = scorer.result()
        seconds = time.perf_counter() - began
        size = (Path(folder) / "nbest_predictions.json").stat().st_size
    assert metrics["total"] == count
    figures = {
        "features": count, "peak_anonymous_mib": round(writing.peak_mib, 1),
        "while_summing_up_mib": round(summing.peak_mib, 1), "questions_per_second": round(count / seconds),
        "nbest_file_mb": round(size / 1e6),
    }  # fmt: skip
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
