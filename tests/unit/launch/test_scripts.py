"""The launch scripts: clean by shellcheck, the commands they run, restarts, Slurm by a stand-in for srun."""

import os
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", REPOSITORY / "tests" / "multinode" / "hosts.sh"])


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    command = ["shellcheck", "-x", str(script.relative_to(REPOSITORY))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder for programs that stand in for launchers, first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run(
    script: str, *flags: str, cwd: Path, stand_ins: Path | None = None, **settings: str
) -> subprocess.CompletedProcess[str]:
    own = ("GPUS", "CONFIG", "LAUNCHER", "PORT", "NODES", "HOSTFILE", "REPOSITORY", "RENDEZVOUS", "MAX_RESTARTS")
    kept = {name: value for name, value in os.environ.items() if name not in own and not name.startswith("SLURM")}
    path = f"{stand_ins}{os.pathsep}{kept['PATH']}" if stand_ins else kept["PATH"]
    environment = {**kept, "VENV": "/nowhere", "PATH": path, **settings}
    command = ["bash", str(LAUNCH / script), *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def shown(done: subprocess.CompletedProcess) -> list[list[str]]:
    """The commands that a script printed, as arguments."""
    return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]


def test_local_by_deepspeed_runs_what_it_shows(tmp_path: Path, stand_ins: Path) -> None:
    program(stand_ins, "deepspeed", 'printf "%s\\n" ran "$@"')
    done = run("local.sh", "--output_dir", "my run", cwd=tmp_path, stand_ins=stand_ins, GPUS="2", CONFIG="zero3")
    assert done.returncode == 0, done.stderr
    (command,) = shown(done)
    wanted = "--quiet --num_accelerators 2 --master_port 29500 --module qa_deepspeed train --deepspeed_config zero3"
    assert command == ["deepspeed", *wanted.split(), "--output_dir", "my run"]
    assert done.stdout.splitlines()[1:] == ["ran", *command[1:]]


def test_local_by_torchrun_meets_at_a_rendezvous(tmp_path: Path, stand_ins: Path) -> None:
    settings = {"LAUNCHER": "torchrun", "ECHO_ONLY": "1", "GPUS": "4", "NODES": "2"}
    (static,) = shown(run("local.sh", "--seed", "7", cwd=tmp_path, NODE_RANK="1", MASTER_ADDR="node1", **settings))
    (dynamic,) = shown(run("local.sh", "--seed", "7", cwd=tmp_path, RENDEZVOUS="node1:29400", **settings))
    start, rest = "python -m qa_deepspeed.torchrun --nnodes 2 --nproc_per_node 4", "-m qa_deepspeed train --seed 7"
    assert " ".join(static) == f"{start} --node_rank 1 --master_addr node1 --master_port 29500 {rest}"
    meeting = "--rdzv_backend c10d --rdzv_endpoint node1:29400 --rdzv_id qa_deepspeed-29400 --max_restarts"
    assert " ".join(dynamic) == f"{start} {meeting} 0 {rest}"
    settings |= {"NODES": "1:2", "MAX_RESTARTS": "3"}
    (elastic,) = shown(run("local.sh", "--seed", "7", cwd=tmp_path, RENDEZVOUS="node1:29400", **settings))
    assert " ".join(elastic) == f"{start} {meeting} 3 {rest}".replace("--nnodes 2", "--nnodes 1:2")


@pytest.mark.parametrize(
    "setting",
    [
        {"GPUS": "two"},
        {"PORT": "0"},
        {"LAUNCHER": "rocket"},
        {"NODES": "2"},
        {"NODES": "1:2", "LAUNCHER": "torchrun"},
        {"NODES": "2:"},
        {"MAX_RESTARTS": "1", "LAUNCHER": "torchrun"},
    ],
)
def test_settings_that_are_none_are_one_line(tmp_path: Path, setting: dict[str, str]) -> None:
    done = run("local.sh", cwd=tmp_path, **setting)
    assert done.returncode == 2
    assert done.stderr.startswith("local.sh: error: ") and done.stderr.count("\n") == 1


def hostfile(folder: Path) -> str:
    (folder / "hosts").write_text("# two\nnode1 slots=2\nnode2 slots=4\n")
    return str(folder / "hosts")


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "ssh"])
@pytest.mark.parametrize("name", ["-oProxyCommand=touch", "a;b", "$(id)"])
def test_a_name_that_is_no_host_reaches_no_launcher(tmp_path: Path, stand_ins: Path, launcher: str, name: str) -> None:
    program(stand_ins, "ssh", f'case "$*" in *ProxyCommand*) touch {tmp_path}/called ;; esac')
    program(stand_ins, "deepspeed", f"touch {tmp_path}/called")
    (tmp_path / "hosts").write_text(f"node1 slots=1\n{name} slots=1\n")
    settings = {"HOSTFILE": str(tmp_path / "hosts"), "LAUNCHER": launcher}
    done = run("multinode.sh", cwd=tmp_path, stand_ins=stand_ins, **settings)
    assert done.returncode == 2 and f"'{name}' is not the name of a host" in done.stderr
    assert not (tmp_path / "called").exists()


def test_multinode_leaves_out_hosts_that_do_not_answer_and_starts_again(tmp_path: Path, stand_ins: Path) -> None:
    """node2 is gone after the first launch; the second, on node1 alone, ends well."""
    program(stand_ins, "ssh", f'[ ! -e {tmp_path}/lost ] || case " $* " in *" node2 "*) exit 255 ;; esac')
    program(stand_ins, "deepspeed", f'cat "$3"; [ -e {tmp_path}/lost ] || {{ touch {tmp_path}/lost; exit 247; }}')
    done = run(
        "multinode.sh",
        "--max_restarts",
        "1",
        "--global_batch_size",
        "8",
        cwd=tmp_path,
        stand_ins=stand_ins,
        HOSTFILE=hostfile(tmp_path),
        MASTER_ADDR="10.0.0.1",
    )
    assert done.returncode == 0, done.stderr
    first, second = shown(done)
    assert first == second and first[4:6] == ["--launcher", "pdsh"]
    assert first[8:10] == ["--master_addr", "10.0.0.1"] and first[-3:] == ["train", "--global_batch_size", "8"]
    lines = [line for line in done.stdout.splitlines() if line.startswith("node")]
    assert lines == ["node1 slots=2", "node2 slots=4", "node1 slots=2"]
    assert "ended with status 247; restart 1 of 1" in done.stderr and "node2 does not answer" in done.stderr


@pytest.mark.parametrize(("status", "launches"), [(0, 1), (2, 1), (75, 1), (1, 3)])
def test_what_multinode_tries_again(tmp_path: Path, stand_ins: Path, status: int, launches: int) -> None:
    program(stand_ins, "ssh", "exit 0")
    program(stand_ins, "deepspeed", f"exit {status}")
    done = run("multinode.sh", cwd=tmp_path, stand_ins=stand_ins, HOSTFILE=hostfile(tmp_path), MAX_RESTARTS="2")
    assert done.returncode == status and len(shown(done)) == launches


def test_a_requeue_file_counts_where_the_launcher_changes_the_status(tmp_path: Path, stand_ins: Path) -> None:
    program(stand_ins, "ssh", "exit 0")
    program(stand_ins, "deepspeed", f"mkdir -p {tmp_path}/out; touch {tmp_path}/out/requeue; exit 1")
    done = run(
        "multinode.sh",
        "--output_dir",
        f"{tmp_path}/out",
        cwd=tmp_path,
        stand_ins=stand_ins,
        HOSTFILE=hostfile(tmp_path),
        MAX_RESTARTS="2",
    )
    assert done.returncode == 75 and len(shown(done)) == 1


def test_multinode_tells_mpirun_where_rank_0_is(tmp_path: Path, stand_ins: Path) -> None:
    settings = {"HOSTFILE": hostfile(tmp_path), "LAUNCHER": "openmpi", "PORT": "4000", "ECHO_ONLY": "1"}
    (command,) = shown(run("multinode.sh", "--seed", "7", cwd=tmp_path, SSH_PORT="2222", **settings))
    (given,) = (part for part in command if part.startswith("--launcher_args="))
    given = shlex.split(given.partition("=")[2])
    assert given[:4] == ["-x", "MASTER_ADDR=node1", "-x", "MASTER_PORT=4000"]
    assert given[4:6] == ["--mca", "plm_rsh_args"] and given[6].endswith("-p 2222")
    assert command[-3:] == ["train", "--seed", "7"]


def test_multinode_by_plain_ssh_starts_a_torchrun_on_each_host(tmp_path: Path, stand_ins: Path) -> None:
    program(stand_ins, "ssh", 'while [ "$1" != node1 ] && [ "$1" != node2 ]; do shift; done; shift; eval "$@"')
    program(stand_ins, "python", f'echo "$GLOO_SOCKET_IFNAME" "$PWD" "$@" >>{tmp_path}/started; exit 0')
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0")
    settings = {"HOSTFILE": hostfile(tmp_path), "LAUNCHER": "ssh"}
    done = run("multinode.sh", "--seed", "7", cwd=tmp_path, stand_ins=stand_ins, **settings)
    assert done.returncode == 0, done.stderr
    started = sorted((tmp_path / "started").read_text().splitlines())
    rest = "--master_addr node1 --master_port 29500 -m qa_deepspeed train --seed 7"
    assert started == [
        f"eth0 {tmp_path} -m qa_deepspeed.torchrun --nnodes 2 --nproc_per_node 2 --node_rank 0 {rest}",
        f"eth0 {tmp_path} -m qa_deepspeed.torchrun --nnodes 2 --nproc_per_node 4 --node_rank 1 {rest}",
    ]


def test_by_plain_ssh_one_that_fails_ends_the_others(tmp_path: Path, stand_ins: Path) -> None:
    program(stand_ins, "ssh", 'case "$*" in *" true") exit 0 ;; *"node_rank 1"*) exit 9 ;; *) exec sleep 50 ;; esac')
    done = run("multinode.sh", cwd=tmp_path, stand_ins=stand_ins, HOSTFILE=hostfile(tmp_path), LAUNCHER="ssh")
    assert done.returncode == 9


FAKE_SRUN = """
shift  # --kill-on-bad-exit=1
export SLURM_NTASKS=4 SLURM_STEP_TASKS_PER_NODE="2(x2)"
for number in 0 1 2 3; do
    SLURM_PROCID=$number SLURM_LOCALID=$((number % 2)) "$@" || status=$?
done
exit ${status:-0}
"""
FAKE_PYTHON = (
    'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*"; exit ${TRAIN_STATUS:-0}'
)


def slurm(tmp_path: Path, stand_ins: Path, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    program(stand_ins, "srun", FAKE_SRUN)
    program(stand_ins, "python", FAKE_PYTHON)
    program(stand_ins, "scontrol", 'if [ "$1" = show ]; then printf "%s\\n" node7 node8; else echo "scontrol $*"; fi')
    spool = tmp_path / "spool"  # Slurm runs a copy
    spool.mkdir()
    copy = Path(shutil.copy(LAUNCH / "slurm.sbatch", spool / "slurm_script"))
    given = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_SUBMIT_DIR": str(REPOSITORY)}
    return run(str(copy), *flags, cwd=tmp_path, stand_ins=stand_ins, **{**given, **settings})


def test_slurm_gives_every_rank_its_variables(tmp_path: Path, stand_ins: Path) -> None:
    done = slurm(tmp_path, stand_ins, "--seed", "7", CONFIG="zero3")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("+")]
    flags = "-m qa_deepspeed train --deepspeed_config zero3 --seed 7"
    assert lines == [f"{rank} {rank % 2} 4 2 node7 23456 {flags}" for rank in range(4)]


def test_slurm_takes_one_run_of_a_list_in_each_task_of_an_array(tmp_path: Path, stand_ins: Path) -> None:
    (tmp_path / "runs.txt").write_text("configs/seed-1.yaml\nconfigs/seed-2.yaml\n")
    done = slurm(tmp_path, stand_ins, RUNS="runs.txt", SLURM_ARRAY_TASK_ID="2")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("+")]
    assert {line.partition(" -m ")[2] for line in lines} == {"qa_deepspeed train --config configs/seed-2.yaml"}


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (2, False), (1, False)])
def test_slurm_puts_a_stopped_run_back_into_the_queue(
    tmp_path: Path, stand_ins: Path, status: int, requeued: bool
) -> None:
    done = slurm(tmp_path, stand_ins, TRAIN_STATUS=str(status))
    assert ("scontrol requeue 123456" in done.stdout) == requeued
    assert done.returncode == (0 if requeued else status)


def test_slurm_from_another_folder_is_one_line(tmp_path: Path, stand_ins: Path) -> None:
    done = slurm(tmp_path, stand_ins, SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2 and "submit from the repository's folder" in done.stderr
