"""launch/Dockerfile: the rules of images that matter here; no image is built."""

import re
import shlex
from typing import NamedTuple

import pytest
import yaml

import qa_deepspeed
from tests.paths import REPOSITORY
from tests.unit.launch.test_scripts import LAUNCH

DOCKERFILE = (LAUNCH / "Dockerfile").read_text()

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
