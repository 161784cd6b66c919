"""A disk that is full or fails at any moment: one line, nothing partial, and the same command finishes."""

from __future__ import annotations

import errno
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qa_deepspeed.cli.data.sample import write_sample
from tests.distributed.launching import by_torchrun, flags, run
from tests.faults.harness import Bench, Fault, compile_library, preload, server, table
from tests.paths import REPOSITORY

SAMPLE, ALL = 10, 240
"""Faults of the test that always runs, and of the complete one."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The runs without faults, and a process in which faults can be planted."""
    folder = tmp_path_factory.mktemp("faults").resolve()
    with server(folder) as running:
        write_sample(folder / "sample", 7, 10, 4)
        yield Bench(folder, running)


def survive(bench: Bench, number: int, seed: int) -> None:
    survived = {
        fault: bench.survive(fault, place) for place, fault in enumerate(bench.faults(number, random.Random(seed)))
    }
    print("\n" + table(survived))
    reached = [outcome for outcome in survived.values() if outcome != "not reached"]
    assert len(reached) > 0.95 * number, "faults beyond the calls of the run"


@pytest.mark.distributed
def test_a_sample_of_faults_is_survived(bench: Bench) -> None:
    survive(bench, SAMPLE, 1)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(3600)
def test_faults_in_every_call_of_every_command_are_survived(bench: Bench) -> None:
    survive(bench, ALL, 2)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_train_on_where_evaluations_have_no_room(tmp_path: Path) -> None:
    """The files of rank 0 alone fail; the other rank must learn that an evaluation, and at the end the run, is off."""
    library = compile_library(tmp_path)
    write_sample(tmp_path / "sample", 7, 10, 4)
    out = tmp_path / "out"
    out.mkdir()
    options = flags(
        model_name_or_path=tmp_path / "sample/model",
        train_file=tmp_path / "sample/train.json",
        predict_file=tmp_path / "sample/dev.json",
        cache_dir=tmp_path / "cache",
        output_dir=out,
        version_2_with_negative=True,
        max_seq_length=160,
        doc_stride=64,
        max_train_examples=24,
        max_eval_examples=24,
        max_steps=4,
        save_steps=2,
        logging_steps=2,
        evaluate_during_training=True,
        do_eval=True,
        save_retry=1,
    )
    full = preload(library, out, Fault("train", "allocate", 1, errno.ENOSPC, True))
    command = [sys.executable, "-m", "qa_deepspeed.torchrun", *by_torchrun(2, "train", *options)[1:]]
    failed = run(command, REPOSITORY, **full)
    text = failed.stdout + failed.stderr
    assert failed.returncode == 75 and text.count("no evaluation after step 2: cannot write") == 1, text
    assert "bytes are needed for a temporary file; training continues" in text
    assert "trying again for 1 s (--save_retry)" in text
    assert f"error: cannot write {out}: No space left on device" in text
    assert "checkpoint-4 was NOT saved; training continues" in text
    assert "the same command trains again, since there is no checkpoint" in text
    assert not list(out.glob("*partial*")) + list(out.glob(".model*"))
    assert "Traceback" not in text
    again = run(command, REPOSITORY)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (out / "metrics.json").is_file() and (out / "model.safetensors").is_file()
