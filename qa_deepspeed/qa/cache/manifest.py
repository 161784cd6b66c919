"""The small JSON files of a cache entry: their shapes, checksums and sums.

manifest.json, reading.json and rejected.json are of the whole entry; each shard that is being built has one of its own.
"""

from __future__ import annotations

from typing import Any

from qa_deepspeed.utils.json_files import CHECKSUM, sealed

Status = dict[str, Any]
"""Status of a complete shard: `size` and `checksum` of its file; `examples` or `counts` of what it holds."""

Shape = dict[Any, Any]

FILE: Shape = {"size": int, "checksum": str}
"""Of one file; a teacher's logits have such a status beside each of their files."""
EXAMPLES: Shape = {**FILE, "examples": int}
COUNTS: Shape = {str: int, "examples": int, "features": int}
REPORT: Shape = {
    **{name: int for name in ("usable", "mended", "unanswerable")},
    **{name: {str: int} for name in ("rejected_by_reason", "answer_faults")},
}
READING: Shape = {"shards": int, "examples": int, "report": REPORT, "rejected?": str}
"""What is known when the input was read to its end; `rejected` is the checksum of rejected.json, if there is one."""

MANIFEST: Shape = {
    "fingerprint": str,
    "counts": COUNTS,
    "shards": [{"examples": EXAMPLES, "features": {**FILE, "features": int}}],
    "index": FILE,
    "report": REPORT,
    "rejected?": str,
}
REJECTED: Shape = {
    "rejected": [{"example_id": (str, type(None)), "file": int, "where": str, "reason": str, "detail?": str}]
}


def shape_of(name: str) -> Shape:
    """The shape of NAME.json, by `json_files.fault_of`."""
    if name.startswith("features-"):
        return {**FILE, "counts": COUNTS}
    if name.startswith("examples-"):
        return EXAMPLES
    return {"manifest": MANIFEST, "reading": READING, "rejected": REJECTED}[name]


def checksum_of(rejected: dict[str, Any]) -> str:
    """The checksum of the content of rejected.json."""
    return str(sealed(rejected)[CHECKSUM])


def total_counts(shards: list[dict[str, Status]]) -> dict[str, int]:
    """The sum of the shards' counts, of which each status keeps only `features`."""
    total: dict[str, int] = {}
    for shard in shards:
        counts = shard["features"].pop("counts")
        shard["features"]["features"] = counts["features"]
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    return total
