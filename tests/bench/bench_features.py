"""Features side by side: questions per second of this package, of its peers, and of the tokenizer alone; and memory.

    python tests/bench/bench_features.py speed [--classic]      one process each, same tokenizer threads
    python tests/bench/bench_features.py processes              two processes against one
    python tests/bench/bench_features.py memory [--sizes 10000 100000 1000000]

Every figure is taken in a process of its own; the contestants take turns, and the best of --repeats counts, since what
else runs on the machine only ever adds time. Peers, data and model are looked for in the folder that holds the real
data (tests/paths.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
SHARED = Path(os.environ.get("QA_DEEPSPEED_SHARED", REPOSITORY.parent / "shared"))
MODEL = SHARED / "models" / "minilm-l6-uncased"
DATA = SHARED / "data" / "en-v1-train.json"
CLASSIC = "transformers==4.57.6"
CLASSIC_QUESTIONS = 2000
QUESTIONS_PER_CONTEXT = 5


# ---- what is timed; each runs in a process of its own and prints one JSON line ----


def ours(data: str, cache: str) -> dict[str, Any]:
    """Reading, features, writing: `prepare_features` on a cache that does not have them."""
    store, seconds = _prepare(data, cache)
    assert store.built
    return {"questions": len(store.examples), "features": len(store), "seconds": seconds}


def joined(data: str, cache: str) -> dict[str, Any]:
    """The same by a process that may find others at it, and starts when they all are ready."""
    store, seconds = _prepare(data, cache, start=_wait_for_all)
    return {"questions": len(store.examples), "features": len(store), "seconds": seconds}


def again(data: str, cache: str) -> dict[str, Any]:
    """A call on a full cache, not timed."""
    store, seconds = _prepare(data, cache)
    assert not store.built
    return {"seconds": seconds}


def hit(data: str, cache: str) -> dict[str, Any]:
    """From a call on a full cache to the first batch of 32 random rows, then every row once in batches of 256."""
    import numpy as np

    _imports()
    before = _anonymous()
    began = time.perf_counter()
    store, _ = _prepare(data, cache)
    assert not store.built
    store.take(np.random.default_rng(0).integers(0, len(store), 32))
    first = time.perf_counter() - began
    order = np.random.default_rng(1).permutation(len(store))
    began, most = time.perf_counter(), 0.0
    for batch in np.array_split(order, -(-len(order) // 256)):
        store.take(batch)
        most = max(most, _anonymous())
    return {
        "questions": len(store.examples),
        "first_batch_seconds": first,
        "anonymous_mb": most - before,
        "rows_per_second": len(store) / (time.perf_counter() - began),
    }


def memory(data: str, cache: str) -> dict[str, Any]:
    """Building, with the growth of anonymous memory sampled as it goes; the tokenizer is loaded before."""
    most, stop = [0.0], threading.Event()

    def watch() -> None:
        before = _anonymous()
        while not stop.wait(0.05):
            most[0] = max(most[0], _anonymous() - before)

    store, seconds = _prepare(data, cache, start=threading.Thread(target=watch).start)
    stop.set()
    assert store.built
    return {"questions": len(store.examples), "features": len(store), "seconds": seconds, "anonymous_mb": most[0]}


def floor(data: str, cache: str) -> dict[str, Any]:
    """`encode_batch` of the unique contexts and questions, and nothing else."""
    from tokenizers import Tokenizer

    rows = list(_questions(Path(data)))
    texts = list(dict.fromkeys(row["context"] for row in rows)), list(dict.fromkeys(row["question"] for row in rows))
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    began = time.perf_counter()
    for batch in texts:
        tokenizer.encode_batch(batch, add_special_tokens=False)
    return {"questions": len(rows), "features": 0, "seconds": time.perf_counter() - began}


def peer(data: str, cache: str) -> dict[str, Any]:
    """The peer's `datasets.map`, its writing included, its reading left out."""
    import datasets
    from transformers import AutoTokenizer

    spec = importlib.util.spec_from_file_location("peer", SHARED / "peers" / "hf_trainer_qa.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = [{**row, "answers": _columns(row["answers"])} for row in _questions(Path(data))]
    table = datasets.Dataset.from_list(rows)
    arguments = argparse.Namespace(max_seq_length=384, doc_stride=128, tuned=False)
    began = time.perf_counter()
    features = table.map(
        module.make_featurizer(tokenizer, arguments, True),
        batched=True,
        remove_columns=table.column_names,
        load_from_cache_file=False,
        cache_file_name=str(Path(cache) / "peer.arrow"),
    )
    return {"questions": len(rows), "features": len(features), "seconds": time.perf_counter() - began}


CLASSIC_PROGRAM = """
import json, sys, time
from transformers import BertTokenizer
from transformers.data.processors.squad import SquadV1Processor, squad_convert_examples_to_features
model, data, count = sys.argv[1:]
examples = SquadV1Processor().get_train_examples(None, filename=data)[: int(count)]
tokenizer = BertTokenizer.from_pretrained(model)
began = time.perf_counter()
features = squad_convert_examples_to_features(
    examples=examples, tokenizer=tokenizer, max_seq_length=384, doc_stride=128, max_query_length=64, is_training=True,
    return_dataset=False, threads=1, tqdm_enabled=False)
print(json.dumps({"questions": len(examples), "features": len(features), "seconds": time.perf_counter() - began}))
"""


def classic(folder: Path) -> dict[str, Any]:
    """`squad_convert_examples_to_features` of the last release that has it, in an environment of its own."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", CLASSIC, "numpy"], check=True)
    command = [str(python), "-c", CLASSIC_PROGRAM, str(MODEL), str(DATA), str(CLASSIC_QUESTIONS)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    return json.loads(done.stdout.splitlines()[-1])


# ---- parts ----


def _imports() -> None:
    import transformers

    import qa_deepspeed.qa.cache.prepare  # noqa: F401

    _ = transformers.AutoTokenizer, transformers.AutoConfig


def _prepare(data: str, cache: str, start: Callable[[], object] = lambda: None) -> tuple[Any, float]:
    """The features, and the seconds they took; `start` is called when all is loaded."""
    from transformers import AutoConfig, AutoTokenizer

    from qa_deepspeed.qa.cache.prepare import prepare_features
    from qa_deepspeed.qa.data.reading import DataSource
    from qa_deepspeed.qa.features.build import FeatureSettings
    from qa_deepspeed.qa.features.families import family_of

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    family = family_of(AutoConfig.from_pretrained(MODEL), tokenizer)
    # The overlap that the peer takes, so that both cut the same windows.
    settings = FeatureSettings(max_seq_length=384, doc_stride=128, doc_stride_is="overlap", max_query_length=64)
    start()
    began = time.perf_counter()
    store = prepare_features(DataSource((data,), "train", False), tokenizer, family, settings, Path(cache))
    return store, time.perf_counter() - began


def _wait_for_all() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def _anonymous() -> float:
    """Anonymous memory of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this kernel does not report RssAnon")


def _questions(path: Path) -> Iterator[dict[str, Any]]:
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for one in paragraph["qas"]:
                yield {
                    "id": one["id"],
                    "context": paragraph["context"],
                    "question": one["question"],
                    "answers": one["answers"],
                }


def _columns(answers: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {"text": [one["text"] for one in answers], "answer_start": [one["answer_start"] for one in answers]}


def recombined(path: Path, questions: int) -> None:
    """JSON lines of this many questions over contexts of real sentences put together anew, all distinct."""
    rows = list(_questions(DATA))
    contexts = dict.fromkeys(row["context"] for row in rows)
    sentences = [one for context in contexts for one in re.split(r"(?<=[.!?]) ", context) if one]
    rng = random.Random(7)
    with open(path, "w", encoding="utf-8") as handle:
        for number in range(questions):
            if number % QUESTIONS_PER_CONTEXT == 0:
                context = f"{number}."
                while len(context) < 700:
                    context += " " + rng.choice(sentences)
                words = [(match.start(), match.group()) for match in re.finditer(r"\S+", context)]
            start, text = rng.choice(words)
            row = {
                "id": f"r{number}",
                "context": context,
                "question": rng.choice(rows)["question"],
                "answers": {"text": [text], "answer_start": [start]},
            }
            handle.write(json.dumps(row) + "\n")


def _timed(name: str, data: Path, cache: Path, threads: int | None) -> dict[str, Any]:
    return _finish(_start(name, data, cache, threads))


def _start(name: str, data: Path, cache: Path, threads: int | None) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "OMP_NUM_THREADS": "1"}
    if threads is not None:
        environment["RAYON_NUM_THREADS"] = str(threads)
    command = [sys.executable, __file__, "one", name, str(data), str(cache)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"a measurement failed with status {process.returncode}")
    return json.loads(out.splitlines()[-1])


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# ---- tables ----


def speed(folder: Path, repeats: int, with_classic: bool) -> None:
    """This package, the peer and the floor on the same file, by turns."""
    best: dict[str, dict[str, Any]] = {}
    for _ in range(repeats):
        for name in ("floor", "ours", "peer"):
            found = _timed(name, DATA, _fresh(folder / "cache"), None)
            if name not in best or found["seconds"] < best[name]["seconds"]:
                best[name] = found
    if with_classic:
        best["ours, 1 thread"] = min(
            (_timed("ours", DATA, _fresh(folder / "cache"), 1) for _ in range(repeats)),
            key=lambda found: found["seconds"],
        )
        best["classic, 1 thread"] = classic(folder.parent / "bench_features_classic")
    print("| what | questions | features | seconds | questions/s |\n|---|---|---|---|---|")
    for name, found in best.items():
        rate = found["questions"] / found["seconds"]
        print(f"| {name} | {found['questions']:,} | {found['features']:,} | {found['seconds']:.2f} | {rate:,.0f} |")
    seconds = {name: found["seconds"] / found["questions"] for name, found in best.items()}
    print(f"\nours / peer: {seconds['peer'] / seconds['ours']:.2f} times the questions per second")
    print(f"ours / floor: {seconds['ours'] / seconds['floor']:.2f} times the time")
    if with_classic:
        ratio = seconds["classic, 1 thread"] / seconds["ours, 1 thread"]
        print(f"ours / classic, one thread each: {ratio:.1f} times the questions per second")


def processes(folder: Path, repeats: int) -> None:
    """One process against two at once on one cache, each with one tokenizer thread."""
    best: dict[int, float] = {}
    for _ in range(repeats):
        for count in (1, 2):
            cache = _fresh(folder / "cache")
            started = [_start("joined", DATA, cache, 1) for _ in range(count)]
            for process in started:
                assert process.stdout is not None and process.stdout.readline() == "ready\n"
            for process in started:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            took = max(_finish(process)["seconds"] for process in started)
            best[count] = min(took, best.get(count, took))
    print("| processes | seconds |\n|---|---|")
    for count, took in best.items():
        print(f"| {count} | {took:.2f} |")
    print(f"\ntwo / one: {best[1] / best[2]:.2f} times the speed")


def curve(folder: Path, sizes: list[int]) -> None:
    """Time and anonymous memory of building and of reading, as the set grows."""
    print("| questions | build s | questions/s | build RssAnon MB | hit to batch s | read rows/s | read RssAnon MB |")
    print("|---|---|---|---|---|---|---|")
    for size in sizes:
        data = folder / f"recombined-{size}.jsonl"
        if not data.exists():
            recombined(data, size)
        cache = _fresh(folder / "cache")
        built = _timed("memory", data, cache, None)
        _timed("again", data, cache, None)  # the digest of a file is remembered once it is no longer new
        found = _timed("hit", data, cache, None)
        print(
            f"| {size:,} | {built['seconds']:.1f} | {size / built['seconds']:,.0f} | {built['anonymous_mb']:.0f} "
            f"| {found['first_batch_seconds']:.2f} | {found['rows_per_second']:,.0f} | {found['anonymous_mb']:.0f} |",
            flush=True,
        )


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["speed", "processes", "memory", "one"])
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bench_features")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--classic", action="store_true", help=f"also install and time {CLASSIC}")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.table == "one":
        name, data, cache = arguments.rest
        contestants = {one.__name__: one for one in (ours, joined, again, hit, memory, floor, peer)}
        print(json.dumps(contestants[name](data, cache)))
    elif arguments.table == "speed":
        speed(arguments.folder, arguments.repeats, arguments.classic)
    elif arguments.table == "processes":
        processes(arguments.folder, arguments.repeats)
    else:
        curve(arguments.folder, arguments.sizes)


if __name__ == "__main__":
    main()
