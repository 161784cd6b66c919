"""launch/kubernetes.yaml against the types of the Kubernetes API, and its command against launch/local.sh.

TYPES is a slice of the API reference (batch/v1 Job, v1 Service; the documentation of Kubernetes 1.26 and later): the
objects and fields that the manifest uses, no others. A field that is misspelt, in the wrong object or of the wrong type
fails.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from qa_deepspeed.runs.requeue import REQUEUE_STATUS
from tests.unit.launch.test_scripts import LAUNCH, run, shown

TYPES: dict[str, dict[str, Any]] = {
    "ObjectMeta": {"name": str},
    "Service": {"apiVersion": "v1", "kind": "Service", "metadata": "ObjectMeta", "spec": "ServiceSpec"},
    "ServiceSpec": {"clusterIP": str, "publishNotReadyAddresses": bool, "selector": {str: str}},
    "Job": {"apiVersion": "batch/v1", "kind": "Job", "metadata": "ObjectMeta", "spec": "JobSpec"},
    "JobSpec": {
        "completionMode": ("Indexed", "NonIndexed"),
        "completions": int,
        "parallelism": int,
        "backoffLimit": int,
        "podFailurePolicy": "PodFailurePolicy",
        "template": "PodTemplateSpec",
    },
    "PodFailurePolicy": {"rules": ["PodFailurePolicyRule"]},
    "PodFailurePolicyRule": {
        "action": ("FailJob", "FailIndex", "Ignore", "Count"),
        "onExitCodes": "OnExitCodes",
        "onPodConditions": ["OnPodConditionsPattern"],
    },
    "OnExitCodes": {"operator": ("In", "NotIn"), "values": [int], "containerName": str},
    "OnPodConditionsPattern": {"type": str, "status": ("True", "False", "SkipCheck")},
    "PodTemplateSpec": {"metadata": "ObjectMeta", "spec": "PodSpec"},
    "PodSpec": {
        "subdomain": str,
        "restartPolicy": ("Always", "OnFailure", "Never"),
        "terminationGracePeriodSeconds": int,
        "securityContext": "PodSecurityContext",
        "containers": ["Container"],
        "volumes": ["Volume"],
    },
    "PodSecurityContext": {"runAsNonRoot": bool, "runAsUser": int, "runAsGroup": int, "fsGroup": int},
    "Container": {
        "name": str,
        "image": str,
        "command": [str],
        "args": [str],
        "env": ["EnvVar"],
        "ports": ["ContainerPort"],
        "resources": "ResourceRequirements",
        "volumeMounts": ["VolumeMount"],
    },
    "EnvVar": {"name": str, "value": str, "valueFrom": "EnvVarSource"},
    "EnvVarSource": {"fieldRef": "ObjectFieldSelector"},
    "ObjectFieldSelector": {"fieldPath": str},
    "ContainerPort": {"containerPort": int},
    "ResourceRequirements": {"limits": {str: str}, "requests": {str: str}},
    "VolumeMount": {"name": str, "mountPath": str},
    "Volume": {"name": str, "persistentVolumeClaim": "PersistentVolumeClaimVolumeSource", "emptyDir": "EmptyDir"},
    "PersistentVolumeClaimVolumeSource": {"claimName": str},
    "EmptyDir": {"medium": str, "sizeLimit": str},
}

REQUIRED = {
    "Service": {"apiVersion", "kind", "metadata"},
    "Job": {"apiVersion", "kind", "metadata", "spec"},
    "JobSpec": {"template"},
    "PodFailurePolicy": {"rules"},
    "PodFailurePolicyRule": {"action"},
    "OnExitCodes": {"operator", "values"},
    "OnPodConditionsPattern": {"type"},
    "PodSpec": {"containers"},
    "Container": {"name", "image"},
    "EnvVar": {"name"},
    "ObjectFieldSelector": {"fieldPath"},
    "ContainerPort": {"containerPort"},
    "VolumeMount": {"name", "mountPath"},
    "Volume": {"name"},
    "PersistentVolumeClaimVolumeSource": {"claimName"},
}
"""Without the image, where the API lets a default stand in: a manifest that is applied as it is needs it."""


def faults(value: Any, kind: Any, where: str) -> list[str]:
    """What of `value` is not of this type: a name in TYPES, a Python type, one value or some, [item] or {str: str}."""
    if isinstance(kind, str) and kind in TYPES and not isinstance(value, str):
        if not isinstance(value, dict):
            return [f"{where} is not an object"]
        missing = [f"{where} has no {name}" for name in sorted(REQUIRED.get(kind, set()) - value.keys())]
        unknown = [f"{where} has no field {name} in {kind}" for name in value.keys() - TYPES[kind].keys()]
        known = value.keys() & TYPES[kind].keys()
        return (
            missing
            + unknown
            + [one for name in sorted(known) for one in faults(value[name], TYPES[kind][name], f"{where}.{name}")]
        )
    if isinstance(kind, list):
        if not isinstance(value, list) or not value:
            return [f"{where} is not a list with entries"]
        return [one for number, item in enumerate(value) for one in faults(item, kind[0], f"{where}[{number}]")]
    if isinstance(kind, dict):
        good = isinstance(value, dict) and all(isinstance(part, str) for pair in value.items() for part in pair)
        return [] if good else [f"{where} is not a map of strings"]
    if isinstance(kind, type):
        return [] if type(value) is kind else [f"{where} is {value!r}, not of type {kind.__name__}"]
    return [] if value in ((kind,) if isinstance(kind, str) else kind) else [f"{where} is {value!r}, not {kind!r}"]


def manifest() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return service, job


def test_the_manifest_is_of_the_types_of_the_api() -> None:
    service, job = manifest()
    assert faults(service, "Service", "service") + faults(job, "Job", "job") == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "completion"), 2),
        (("spec", "completions"), "2"),
        (("spec", "completionMode"), "indexed"),
        (("spec", "template", "spec", "subDomain"), "x"),
        (("spec", "template", "spec", "containers"), []),
        (("spec", "podFailurePolicy", "rules"), [{"onExitCodes": {"operator": "In", "values": ["75"]}}]),
        (("spec", "template", "spec", "containers", 0, "resources", "limits"), {"nvidia.com/gpu": 8}),
    ],
)
def test_a_wrong_manifest_is_found(path: tuple[Any, ...], value: Any) -> None:
    job = copy.deepcopy(manifest()[1])
    place = job
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert faults(job, "Job", "job")


def test_the_kubernetes_manifest_runs_what_local_shows(tmp_path: Path) -> None:
    service, job = manifest()
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = container["command"] + container["args"]
    settings = {
        "NODES": str(spec["completions"]),
        "GPUS": str(container["resources"]["limits"]["nvidia.com/gpu"]),
        "NODE_RANK": "$(JOB_COMPLETION_INDEX)",
        "MASTER_ADDR": f"{job['metadata']['name']}-0.{pod['subdomain']}",
    }
    done = run("local.sh", *container["args"], cwd=tmp_path, LAUNCHER="torchrun", ECHO_ONLY="1", **settings)
    assert shown(done) == [command]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    assert pod["restartPolicy"] == "Never", "a failure policy by exit status needs it"
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    rules = [rule for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    by_status = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules}
    assert by_status == {"Ignore": [REQUEUE_STATUS], "FailJob": [2]}
