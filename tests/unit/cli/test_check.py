"""The preflight: a good run is described; every cause of a failing start is one line that says what to do."""

import dataclasses
import json
import os
import re
import shutil
import socket
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from qa_deepspeed.cli.training import check as preflight
from qa_deepspeed.cli.training.check import check
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.facts import model_facts
from qa_deepspeed.qa.data.examples import Answer, Example
from qa_deepspeed.runs.lock import RunLock
from qa_deepspeed.training.features import load_features
from qa_deepspeed.utils import hosts
from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.hosts import versions
from tests.unit import small_tokenizers
from tests.unit.reference_features import write_squad

ROWS = [Example(f"q{n}", "who?", f"The Rhine rises in {n}.", (Answer("Rhine", 4),)) for n in range(20)]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No launcher, no file of the user's, no cache of compiled operators."""
    for name in ("WORLD_SIZE", "DS_ENV_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(hosts, "CONNECT_SECONDS", 1)


@pytest.fixture
def run(tmp_path: Path) -> RunOptions:
    """A run that would start, its training features built."""
    small_tokenizers.tokenizer("bert").save_pretrained(tmp_path / "model")
    config = small_tokenizers.config("bert")
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size = 32, 2, 2, 64
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").touch()  # no weights are read
    given: dict[str, Any] = dict(
        model_name_or_path=str(tmp_path / "model"),
        train_file=write_squad(tmp_path / "train.json", ROWS),
        cache_dir=str(tmp_path / "cache"),
        output_dir=str(tmp_path / "out"),
        no_cuda=True,
        learning_rate=1e-4,
        warmup_steps=2,
        per_gpu_train_batch_size=4,
        max_seq_length=64,
        max_query_length=16,
        doc_stride=16,
    )
    options = RunOptions(**given, given=frozenset(given))
    load_features(options, "train", model_facts(options))
    return options


def changed(run: RunOptions, **changes: Any) -> RunOptions:
    return dataclasses.replace(run, **changes, given=run.given | changes.keys())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def faults(capsys: pytest.CaptureFixture[str], *arguments: Any, **named: Any) -> list[str]:
    """The lines of faults of a check that must fail."""
    assert check(*arguments, **{"port": free_port(), **named}) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("the run would not start")
    return [line for line in out.splitlines() if " FAULT " in line]


def test_a_good_run_prints_what_it_would_do(run: RunOptions, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(run, ranks=2, port=free_port()) == 0
    out = capsys.readouterr().out
    assert "auto, see the model, fp32, on CPUs" in out and "deepspeed_config auto: take zero0" in out
    assert "8 rows a step = micro-batches of 4 x 1 accumulation step x 2 ranks" in out
    assert "learning_rate 0.0001   (the command line)" in out and "seed 42   (default)" in out
    assert "20 questions, 20 features in the cache" in out
    assert "9 optimizer steps" in out
    assert "learning rate 0 at the first step, 0.0001 at its peak (step 3), 1.43e-05 at the last" in out
    assert out.splitlines()[-1] == "the run would start"
    assert not Path(str(run.output_dir)).exists()


def test_features_that_are_not_built_are_said_to_miss(run: RunOptions, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(changed(run, max_seq_length=63), port=free_port()) == 0
    out = capsys.readouterr().out
    assert "not in the cache: features are built first" in out and "steps are known once" in out


def test_weights_of_files_and_intervals_count_in_the_schedule(
    run: RunOptions, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """30 rows of the mixture are 8 steps of 4 rows an epoch, 24 in all."""
    write_squad(
        tmp_path / "more.json", [Example(f"m{n}", "who?", "The Rhine.", (Answer("Rhine", 4),)) for n in range(20)]
    )
    mixed = changed(
        run, train_file=f"{run.train_file}=1,{tmp_path / 'more.json'}=0.5", save_steps="epoch", eval_steps=5
    )
    mixed = changed(mixed, predict_file=str(tmp_path / "more.json"))
    assert check(mixed, port=free_port()) == 0
    assert "steps are known once" in capsys.readouterr().out
    load_features(mixed, "train", model_facts(mixed))
    assert check(mixed, port=free_port()) == 0
    out = capsys.readouterr().out
    assert "40 questions, 40 features in the cache" in out and "30 rows an epoch, by the weights of the files" in out
    assert "24 optimizer steps, a checkpoint every 8, a log line every 1" in out and "5 evaluations" in out
    assert f"WARNING: trained on and evaluated on: {tmp_path / 'more.json'}: scores" in out
    (fault,) = faults(capsys, changed(run, train_file=f"{run.train_file}=0"))
    assert "the weight of a file must be a number above 0" in fault


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("exists", [True, False])
def test_a_checkpoint_that_is_none_is_a_fault_whatever_is_known(
    run: RunOptions, capsys: pytest.CaptureFixture[str], built: bool, exists: bool
) -> None:
    """As in train; true means the newest, if there is one."""
    if exists:
        Path(str(run.output_dir)).mkdir()
    run = run if built else changed(run, max_seq_length=63)
    for word in ("true", "True", "auto", "never"):
        assert check(changed(run, resume_from_checkpoint=word), port=free_port()) == 0
    capsys.readouterr()
    (fault,) = faults(capsys, changed(run, resume_from_checkpoint="gone/checkpoint-5"))
    assert "gone/checkpoint-5 is not a complete checkpoint" in fault
    assert not exists or not list(Path(str(run.output_dir)).iterdir())


def test_batch_arithmetic(run: RunOptions, capsys: pytest.CaptureFixture[str]) -> None:
    (fault,) = faults(capsys, changed(run, global_batch_size=33))
    assert "33 does not divide" in fault and "take global_batch_size 32 or 36" in fault


def test_micro_batches_by_tokens(run: RunOptions, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """The longest rows that fit together are what memory is computed for, not per_gpu_train_batch_size."""
    printed, rows, footprint = [], [], preflight.footprint
    monkeypatch.setattr(preflight, "footprint", lambda *given: rows.append(given[1]) or footprint(*given))
    for tokens in (None, 130, 100_000):
        assert check(changed(run, max_tokens_per_batch=tokens, global_batch_size=32), ranks=2, port=free_port()) == 0
        printed.append(capsys.readouterr().out)
    assert "cut into micro-batches" not in printed[0]
    assert "at most 130 tokens on a rank: 2 of the longest rows" in printed[1]
    assert "at most 100,000 tokens on a rank: 16 of the longest rows" in printed[2]
    assert rows == [4, 2, 16]


def test_lora_is_counted_as_what_it_trains(run: RunOptions, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for options in (run, changed(run, lora_rank=2)):
        assert check(options, port=free_port()) == 0
        printed.append(capsys.readouterr().out)
    assert "of them trained" not in printed[0] and re.search(r"[\d,]+ parameters, [\d,]+ of them trained", printed[1])


def test_what_train_refuses_for_the_model_is_refused_here(
    run: RunOptions, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """An attention that Transformers does not have, before any weights are read; and a folder without weights."""
    wrong = changed(run, attn_implementation="fastest")
    (fault,) = faults(capsys, wrong)
    with pytest.raises(UserError, match="attn_implementation fastest cannot be used: .*; leave it out") as refused:
        load_features(wrong, "train", model_facts(wrong))
    assert fault.endswith(str(refused.value))
    assert check(changed(run, attn_implementation="eager"), port=free_port()) == 0
    capsys.readouterr()
    (tmp_path / "model" / "model.safetensors").unlink()
    (fault,) = faults(capsys, run)
    assert re.search(r"model: holds no weights \(.*\): pass the folder of a saved model", fault)


def test_an_evaluation_is_checked_as_one(run: RunOptions, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`train --do_train false` needs no training data, and refuses to replace another model's answers."""
    only = changed(run, do_train=False, do_eval=True, train_file=None, predict_file=run.train_file)
    assert check(only, port=free_port()) == 0
    out = capsys.readouterr().out
    assert "do_train is false: the model is evaluated, in fp32" in out and "train:" not in out
    assert check(changed(only, output_dir=None), port=free_port()) == 0
    assert "the scores are printed, and nothing is written" in capsys.readouterr().out
    (fault,) = faults(capsys, changed(only, output_dir=None, gather="full"))
    assert "gather reads or leaves files in a folder: pass --output_dir" in fault
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.json").write_text("{}")
    (fault,) = faults(capsys, only)
    assert "holds predictions.json of which no record says whose it is" in fault
    (fault,) = faults(capsys, changed(only, overwrite_output_dir=True, predict_file="gone.json"))
    assert "gone.json: no such file" in fault


def test_a_missing_data_file(run: RunOptions, capsys: pytest.CaptureFixture[str]) -> None:
    (fault,) = faults(capsys, changed(run, train_file="gone.json"))
    assert "gone.json: no such file; check the path" in fault


def test_too_little_memory(run: RunOptions, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(preflight, "free_host_memory", lambda: 2**28)
    (fault,) = faults(capsys, run)
    assert "0.25 GiB free" in fault and "take fewer ranks" in fault


def test_an_output_folder_in_use(run: RunOptions, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    folder = Path(str(run.output_dir))
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (fault,) = faults(capsys, run)
    assert "is not empty" in fault and "--overwrite_output_dir" in fault
    (folder / "notes.txt").unlink()
    # A record lock does not stop its own process: the holder is another one.
    reading, writing = os.pipe()
    holder = os.fork()
    if holder == 0:
        lock = RunLock(folder)
        os.write(writing, b"held")
        time.sleep(60)
        lock.release()
        os._exit(0)
    try:
        os.read(reading, 4)
        monkeypatch.setattr("qa_deepspeed.runs.lock.RunLock.__init__.__defaults__", (0.0,))
        (fault,) = faults(capsys, run)
        assert "another run is using" in fault and f"process {holder}" in fault
    finally:
        os.kill(holder, 9)
        os.waitpid(holder, 0)


def test_a_port_that_is_taken(run: RunOptions, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        (fault,) = faults(capsys, run, port=taken.getsockname()[1])
    assert "is taken here" in fault and "--master_port" in fault


def with_optimizer(tmp_path: Path) -> str:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}))
    return str(path)


def test_no_compiler_for_an_operator_that_needs_one(
    run: RunOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    (fault,) = faults(capsys, changed(run, deepspeed_config=with_optimizer(tmp_path)))
    assert "fused_adam compiled, and there is no no-such-compiler; install it" in fault


def test_a_stale_lock_of_an_interrupted_build(
    run: RunOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("CXX", "sh")
    lock = tmp_path / "extensions" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert check(changed(run, deepspeed_config=with_optimizer(tmp_path)), port=free_port()) == 0  # it may be at work
    os.utime(lock, (time.time() - 7200,) * 2)
    (fault,) = faults(capsys, changed(run, deepspeed_config=with_optimizer(tmp_path)))
    assert "is 120 minutes old" in fault and f"rm {lock}" in fault


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("node1 slots=2\nnode2 slot=2\n", "line 2: 'node2 slot=2' is not like 'node1 slots=8'"),
        ("node1\n", "line 1: 'node1' is not like"),
        ("# nothing\n\n", "names no host"),
        ("node1 slots=2\nnode1 slots=2\n", "line 2: node1 is listed twice"),
        ("node1 slots=0\n", "line 1"),
        ("node1 slots=1\n-oProxyCommand=id slots=1\n", "line 2: '-oProxyCommand=id' is not the name of a host"),
        ("$(id) slots=1\n", "line 1: '$(id)' is not the name of a host"),
    ],
)
def test_wrong_hostfile_lines(
    run: RunOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str, message: str
) -> None:
    (tmp_path / "hostfile").write_text(lines)
    assert any(message in fault for fault in faults(capsys, run, hostfile=str(tmp_path / "hostfile")))


def fake_ssh(tmp_path: Path, monkeypatch: Any, answer: str) -> Path:
    """An `ssh` first on PATH: node1 answers as this host, node2 does what `answer` says."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "ssh"
    alike = f"echo '{json.dumps(versions())}'"
    script.write_text(f"#!/bin/sh\ncase \" $* \" in\n*' node1 '*) {alike} ;;\n*) {answer} ;;\nesac\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    return hostfile


def test_hosts_that_answer_alike(run: RunOptions, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    (tmp_path / ".deepspeed_env").write_text("PATH=/usr/bin\nGLOO_SOCKET_IFNAME=eth0\n")
    hostfile = fake_ssh(tmp_path, monkeypatch, f"echo '{json.dumps(versions())}'")
    assert check(run, hostfile=str(hostfile), port=free_port()) == 0
    out = capsys.readouterr().out
    assert "2 hosts, 2 ranks" in out and "2 answer, with the versions of this one" in out
    assert "from .deepspeed_env PATH, GLOO_SOCKET_IFNAME" in out


def test_a_host_that_cannot_be_reached(run: RunOptions, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    hostfile = fake_ssh(tmp_path, monkeypatch, "echo 'connect to host node2: No route' >&2; exit 255")
    (fault,) = faults(capsys, run, hostfile=str(hostfile))
    assert "node2 cannot be reached: connect to host node2: No route; try 'ssh node2 true'" in fault


def test_a_version_that_differs_on_one_host(run: RunOptions, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    other = json.dumps({**versions(), "transformers": "4.9"})
    hostfile = fake_ssh(tmp_path, monkeypatch, f"echo '{other}'")
    (fault,) = faults(capsys, run, hostfile=str(hostfile))
    assert f"node2 has transformers 4.9, this host has {versions()['transformers']}; install the same" in fault


def test_a_host_without_the_program(run: RunOptions, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    hostfile = fake_ssh(tmp_path, monkeypatch, "echo 'No such file or directory' >&2; exit 1")
    (fault,) = faults(capsys, run, hostfile=str(hostfile))
    assert "node2 has no such program" in fault and "No such file" in fault


def test_a_bad_line_of_the_environment_file(run: RunOptions, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / ".deepspeed_env").write_text("PATH=/usr/bin\nexport\n")
    (fault,) = faults(capsys, run)
    assert ".deepspeed_env, line 2: 'export' is not NAME=VALUE" in fault


def test_swap_files_count_on_their_disk(run: RunOptions, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """That is here the disk of the output folder too; values, two moments, gradients and parameters in float32."""
    (tmp_path / "nvme").mkdir()
    run = dataclasses.replace(run, deepspeed_config="zero3_nvme", nvme_path=str(tmp_path / "nvme"), save_steps=0)
    swaps = preflight.swap_bytes
    monkeypatch.setattr(preflight, "swap_bytes", lambda *given: {name: 2**30 for name in swaps(*given)})
    check(run)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("disk")]
    assert len(lines) == 2 and f"swap files of at most 1.00 GiB in {tmp_path / 'nvme'} until the run ends" in lines[1]
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    assert check(run) == 1
    assert "free: make room, or pass another --nvme_path" in capsys.readouterr().out


def test_a_disk_that_is_too_small(run: RunOptions, capsys: Any, monkeypatch: Any) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    (fault,) = faults(capsys, run)
    assert "make room" in fault
