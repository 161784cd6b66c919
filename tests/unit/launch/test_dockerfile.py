"""launch/Dockerfile: the rules of images that matter here, and its Python steps in a fresh environment.

No image is built: a slow test executes the RUN steps of Python packages in a folder of its own, and leaves out those
that change the system (SYSTEM).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement

import qa_deepspeed
from tests.paths import REPOSITORY
from tests.unit.launch.test_scripts import LAUNCH

DOCKERFILE = (LAUNCH / "Dockerfile").read_text()

SYSTEM = ("apt-get", "useradd")
"""Programs of the base image, run as root: steps that begin with one are not executed here."""

WRONG = [
    ("FROM", r"^(?!\S+:\d+\.\d+\.\d+)(?!base\b)", "no exact version"),
    ("RUN", r"apt-get install(?!.*--no-install-recommends)", "installs what is only recommended"),
    ("RUN", r"apt-get install(?!.*--yes)", "asks"),
    ("RUN", r"apt-get update(?!.*rm -rf /var/lib/apt/lists/\*$)", "the lists of packages stay in the layer"),
    ("RUN", r"pip install (?!--constraint launch/constraints\.txt)", "the versions are not pinned"),
    ("RUN", r"\bsudo\b|\bcd ", "USER and WORKDIR do that"),
    ("ENTRYPOINT|CMD", r'^(?!\[("[^"]*"(, )?)+\]$)', "a shell would get the signals"),
    ("WORKDIR", r"^(?!/)", "not absolute"),
    ("USER", r"^(?!\d+:\d+$)|^0+:", "root, or no number: Kubernetes cannot tell"),
    ("ADD", r"", "COPY says what happens"),
    ("ARG|ENV", r"(?i)token|password|secret|_key", "a secret stays in the image"),
]
"""Instructions, a pattern of what they must not be, what is wrong with it. After hadolint and Docker's own advice."""


class Instruction(NamedTuple):
    name: str
    text: str

    def words(self) -> list[str]:
        """The arguments without flags such as --from."""
        return [word for word in shlex.split(self.text) if not word.startswith("--")]


def instructions(text: str) -> list[Instruction]:
    """Those of a Dockerfile, with continued lines joined and without comments."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [Instruction(*line.split(maxsplit=1)) for line in joined]


def image(text: str) -> list[Instruction]:
    """The last stage, which is the image."""
    steps = instructions(text)
    return steps[max(place for place, step in enumerate(steps) if step.name == "FROM") :]


def faults(text: str) -> list[str]:
    steps = instructions(text)
    found = [
        f"{step.name}: {reason}"
        for names, pattern, reason in WRONG
        for step in steps
        if re.fullmatch(names, step.name) and re.search(pattern, step.text)
    ]
    there = {step.name for step in image(text)}
    found += [f"{name}: missing" for name in ("USER", "LABEL", "WORKDIR", "ENTRYPOINT") if name not in there]
    settings = [word for step in steps if step.name == "ENV" for word in step.words()]
    if "PIP_NO_CACHE_DIR=1" not in settings:
        found.append("ENV: pip's cache stays in the layer")
    return found


def test_the_dockerfile_keeps_the_rules() -> None:
    assert faults(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("good", "bad", "fault"),
    [
        ("python:3.11.14-slim-bookworm", "python:latest", "FROM: no exact version"),
        ("--no-install-recommends ", "", "RUN: installs what is only recommended"),
        ("--yes ", "", "RUN: asks"),
        ("    && rm -rf /var/lib/apt/lists/*", "    && true", "RUN: the lists of packages stay in the layer"),
        (" --constraint launch/constraints.txt --no-build", " --no-build", "RUN: the versions are not pinned"),
        ('ENTRYPOINT ["qa-deepspeed"]', "ENTRYPOINT qa-deepspeed", "ENTRYPOINT: a shell would get the signals"),
        ("WORKDIR /home/qa", "WORKDIR qa", "WORKDIR: not absolute"),
        ("USER 1000:1000", "USER 0:0", "USER: root, or no number: Kubernetes cannot tell"),
        ("USER 1000:1000\n", "", "USER: missing"),
        ("COPY setup.cfg", "ADD setup.cfg", "ADD: COPY says what happens"),
        ("ARG TORCH_INDEX_URL=", "ARG HUB_TOKEN=", "ARG: a secret stays in the image"),
        ("PIP_NO_CACHE_DIR=1", "PIP_NO_CACHE_DIR=0", "ENV: pip's cache stays in the layer"),
    ],
)
def test_a_broken_rule_is_found(good: str, bad: str, fault: str) -> None:
    assert good in DOCKERFILE
    assert faults(DOCKERFILE.replace(good, bad)) == [fault]


def test_what_is_copied_reaches_the_builder() -> None:
    """And nothing else: the list of what is left out begins with everything."""
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    copied = [
        source
        for step in instructions(DOCKERFILE)
        if step.name == "COPY" and "--from" not in step.text
        for source in step.words()[:-1]
    ]
    assert rules[0] == "*"
    assert sorted(rule[1:] for rule in rules if rule.startswith("!")) == sorted(copied)
    assert [source for source in copied if not (REPOSITORY / source).exists()] == []


def test_the_version_and_the_user_are_the_same_everywhere() -> None:
    labels = dict(word.split("=", 1) for step in image(DOCKERFILE) if step.name == "LABEL" for word in step.words())
    assert labels["org.opencontainers.image.version"] == qa_deepspeed.__version__
    _, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    name = pod["containers"][0]["image"]
    assert name.endswith(f":{qa_deepspeed.__version__}")
    text = (LAUNCH / "README.md").read_text() + DOCKERFILE
    assert set(re.findall(r"registry\.example\.com[/#](qa-deepspeed:[\d.]*\d)", text)) == {name.split("/")[1]}
    (user,) = (step.text.split(":")[0] for step in image(DOCKERFILE) if step.name == "USER")
    context = pod["securityContext"]
    assert str(context["runAsUser"]) == str(context["fsGroup"]) == user and context["runAsNonRoot"]
    (made,) = (step.text for step in image(DOCKERFILE) if step.text.startswith("useradd"))
    assert f"--uid {user} --user-group" in made


class Folder:
    """A folder in place of an image's file system, in which steps are executed."""

    def __init__(self, root: Path) -> None:
        self.root, self.left_out = root, list[str]()
        tools = root / "tools"
        tools.mkdir(parents=True)
        (tools / "python3").symlink_to(sys._base_executable)  # that of the base image
        own = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
        # Compiling thousands of modules that are not imported takes longer than all else.
        self.environment = {**own, "PATH": f"{tools}:/usr/bin:/bin", "PIP_NO_COMPILE": "1"}
        self.cwd = root

    def place(self, text: str) -> str:
        return text.replace("/opt/", f"{self.root}/opt/").replace("/home/", f"{self.root}/home/")

    def run(self, *command: str) -> str:
        path = shutil.which(command[0], path=self.environment["PATH"])
        assert path is not None, command
        done = subprocess.run([path, *command[1:]], cwd=self.cwd, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def execute(self, step: Instruction) -> None:
        if step.name == "ENV":
            for word in step.words():
                name, value = word.split("=", 1)
                self.environment[name] = self.place(value).replace("$PATH", self.environment["PATH"])
        elif step.name == "WORKDIR":
            self.cwd = Path(self.place(step.text))
            self.cwd.mkdir(parents=True, exist_ok=True)
        elif step.name == "COPY" and "--from" not in step.text:
            *sources, target = step.words()
            for source in sources:
                inside = self.cwd / target / (Path(source).name if target.endswith("/") else "")
                inside.parent.mkdir(parents=True, exist_ok=True)
                if (REPOSITORY / source).is_dir():
                    shutil.copytree(REPOSITORY / source, inside, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(REPOSITORY / source, inside)
        elif step.name == "RUN" and step.text.startswith(SYSTEM):
            self.left_out.append(step.text.split()[0])
        elif step.name == "RUN":
            self.run("sh", "-c", self.place(step.text))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_python_steps_make_an_environment_that_works(tmp_path: Path) -> None:
    """In which the image's command and that of the Kubernetes job run, with the versions that were tested."""
    there = Folder(tmp_path / "image")
    for step in instructions(DOCKERFILE):
        there.execute(step)
    assert there.left_out == list(SYSTEM)
    (entry,) = (step.text for step in image(DOCKERFILE) if step.name == "ENTRYPOINT")
    (command,) = yaml.safe_load(entry)
    assert command in os.listdir(there.root / "opt/venv/bin")
    assert qa_deepspeed.__version__ in there.run(command, "--version")
    there.run(command, "sample", "sample")
    assert (there.cwd / "sample/train.json").exists()
    assert "zero3" in there.run(command, "plan", "--model_name_or_path", "sample/model", "--gpu_memory", "80GiB")
    assert "--nproc" in there.run("python", "-m", "qa_deepspeed.torchrun", "--help")
    there.run("python", "-c", "import deepspeed, onnxruntime, openpyxl, peft")
    there.run("pip", "check")
    pins = [Requirement(line) for line in (LAUNCH / "constraints.txt").read_text().splitlines() if "==" in line]
    wanted = {pin.name.lower().replace("_", "-"): pin.specifier for pin in pins}
    for line in there.run("pip", "list", "--format", "freeze").splitlines():
        name, version = line.lower().replace("_", "-").split("==")
        if name not in ("pip", "qa-deepspeed"):
            assert wanted[name].contains(version), line
