"""Parts of run.json besides the options: data, software, hardware, and checksums of the saved files."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qa_deepspeed.qa.features.store import FeatureStore
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.progress import hash_progress, sha256_of
from qa_deepspeed.utils.units import GIB

PACKAGES = ("torch", "transformers", "tokenizers", "deepspeed", "accelerate", "datasets", "numpy", "pyarrow")
"""Packages whose versions can change results."""

MODEL_FILES = ("*.safetensors", "*.json", "training_args.bin", "*.txt", "*.model", "README.md")
"""Patterns of the files that checksums cover: the saved model, and the run's own JSON files beside it."""


def software() -> dict[str, Any]:
    """Versions of Python and of `PACKAGES`, and the commit of this code if it runs from a checkout."""
    versions = {"python": platform.python_version()}
    for name in ("qa_deepspeed", *PACKAGES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "commit": _commit()}


def _commit() -> str | None:
    """Hash of the checked-out commit, with "+changes" if files differ from it; None outside a checkout."""
    package = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(package), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
        tracked = subprocess.run([*command[:3], "ls-files", "--error-unmatch", __file__], capture_output=True)
        described = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return described.stdout.strip() or None if tracked.returncode == 0 else None


def hardware() -> dict[str, Any]:
    """This node's processor, usable cores, memory and GPUs, and the numbers of ranks."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "gpus": gpus,
        "ranks": dist.world_size(),
        "ranks_per_node": dist.local_world_size(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def data_record(store: FeatureStore) -> dict[str, Any]:
    """The data: fingerprint and counts of the features, and numbers of usable, repaired and rejected questions."""
    report = store.report
    return {
        "fingerprint": store.fingerprint,
        "questions": {
            "usable": report.usable,
            "repaired": report.repaired,
            "unanswerable": report.unanswerable,
            "rejected": dict(report.rejected_by_reason),
            "faulty_answers": dict(report.answer_faults),
        },
        "features": store.counts,
    }


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of the files in `folder` that match `MODEL_FILES`, by name; run.json, which holds them, excepted."""
    paths = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    paths = [path for path in paths if path.name != "run.json"]
    with hash_progress("checksums", paths) as bar:
        return {path.name: sha256_of(path, bar) for path in paths}
