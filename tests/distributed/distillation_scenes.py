"""One rank that trains students: `-m tests.distributed.distillation_scenes OPTIONS.json FOLDER`. Every rank asserts."""

import gc
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from qa_deepspeed.models.lora import WEIGHTS_FILE
from qa_deepspeed.utils import dist
from tests.distributed.checkpoint_scenes import FOLDER, OPTIONS, run, same_model
from tests.distributed.launching import losses

STEPS = OPTIONS["max_steps"]


def same_losses(one: str, other: str, steps: int = STEPS) -> None:
    """In every step, to rounding."""
    if dist.is_rank_zero():
        np.testing.assert_allclose(losses(FOLDER / one)[:steps], losses(FOLDER / other)[:steps], rtol=1e-5)


def no_teacher_is_in_memory_while_a_student_trains() -> None:
    """Two partitioned teachers have computed on both ranks; then the student is the only model."""
    models: list[int] = []
    name = "BertForQuestionAnswering"
    count = lambda: models.append(sum(type(one).__name__ == name for one in gc.get_objects()))  # noqa: E731
    printed = run("zero3", f"step 1/{STEPS}", count, deepspeed_config="zero3")
    assert printed.count("computed in") == 2, printed
    assert models == [1] * dist.is_rank_zero(), models


def every_stage_and_layout_has_the_same_losses() -> None:
    """From the same cache; padded and packed rows."""
    for name, changes in {
        "zero0": {"deepspeed_config": "zero0", "batch_layout": "padded", "group_by_length": False},
        "zero2": {"deepspeed_config": "zero2", "batch_layout": "packed", "gradient_accumulation_steps": 2},
    }.items():
        rows = 4 // int(changes.get("gradient_accumulation_steps", 1))
        printed = run(name, **changes, per_gpu_train_batch_size=rows)
        assert (
            len(re.findall(r"teacher .*: logits of .* \(from the cache\)", printed)) == 2
            and "computed in" not in printed
        ), printed
        same_losses("zero3", name)


def a_stopped_run_ends_with_the_same_bytes() -> None:
    """Another weight of the teachers is another run."""
    for stage in ("zero3", "zero2"):
        changes = {"deepspeed_config": stage}
        if stage == "zero2":
            changes |= {"batch_layout": "packed", "gradient_accumulation_steps": 2, "per_gpu_train_batch_size": 2}
        stopped = f"stopped_{stage}"
        printed = run(stopped, f"step 4/{STEPS}", lambda: os.kill(os.getpid(), signal.SIGTERM), **changes)
        assert "stopped: preempted by SIGTERM" in printed, printed
        printed = run(stopped, **changes, distillation_weight=0.5)
        assert "holds another run: distillation_weight was 0.9, is 0.5" in printed, printed
        assert "resuming from" in run(stopped, **changes)
        assert same_model(stage, stopped)


def weight_0_is_plain_training() -> None:
    """To the bit; no teacher is asked."""
    printed = run("weight_0", deepspeed_config="zero2", distillation_weight=0.0)
    assert "logits" not in printed, printed
    names = ("teacher_model_name_or_path", "distillation_weight", "distillation_temperature")
    of_teacher = {name: OPTIONS.pop(name) for name in names}
    run("plain", deepspeed_config="zero2")
    OPTIONS.update(of_teacher)
    assert same_model("weight_0", "plain")
    if dist.is_rank_zero():
        assert np.array_equal(losses(FOLDER / "weight_0"), losses(FOLDER / "plain"))
        assert not np.allclose(losses(FOLDER / "plain"), losses(FOLDER / "zero2"), rtol=1e-2)


def adapters_learn_from_a_teacher() -> None:
    """Only they and the head are trained, with the same losses at any stage."""
    for stage in ("zero0", "zero3"):
        run(f"lora_{stage}", deepspeed_config=stage, lora_rank=4, learning_rate=1e-2)
    same_losses("lora_zero0", "lora_zero3")
    if dist.is_rank_zero():
        found = load_file(FOLDER / "lora_zero0" / WEIGHTS_FILE)
        assert found and all("lora_" in name or "qa_outputs" in name for name in found)


def each_rank_may_have_a_disk_of_its_own() -> None:
    """Rank 0 writes the logits, and the other node's disk gets a copy."""
    cache = FOLDER / f"disk-{dist.rank()}"
    run("disks", deepspeed_config="zero0", max_steps=4, lr_scheduler_type="constant", cache_dir=str(cache))
    run("one_disk", deepspeed_config="zero0", max_steps=4, lr_scheduler_type="constant")
    same_losses("disks", "one_disk", 4)
    names = [
        sorted(path.relative_to(FOLDER / f"disk-{rank}").as_posix() for path in files(FOLDER / f"disk-{rank}"))
        for rank in (0, 1)
    ]
    assert names[0] == names[1] and len(names[0]) == 4, names
    for one, other in zip(files(FOLDER / "disk-0"), files(FOLDER / "disk-1"), strict=True):
        assert one.read_bytes() == other.read_bytes()


def files(folder: Path) -> list[Path]:
    """Files of logits and their statuses."""
    return sorted(path for path in folder.glob("features/teacher-*/logits-*") if path.suffix in (".arrow", ".json"))


def a_student_of_some_layers_starts_from_their_weights() -> None:
    """At any stage; what is saved has as many layers."""
    for stage in ("zero0", "zero3"):
        printed = run(f"layers_{stage}", deepspeed_config=stage, student_layers="1", **{"model_name_or_path": TEACHER})
        assert "fresh weights" not in printed, printed
    same_losses("layers_zero0", "layers_zero3")
    if dist.is_rank_zero():
        config = json.loads((FOLDER / "layers_zero3" / "config.json").read_text())
        assert config["num_hidden_layers"] == 1


TEACHER = OPTIONS["teacher_model_name_or_path"].split(",")[0]


def main() -> None:
    """Play them all."""
    dist.ensure_rank_env()
    no_teacher_is_in_memory_while_a_student_trains()
    every_stage_and_layout_has_the_same_losses()
    a_stopped_run_ends_with_the_same_bytes()
    weight_0_is_plain_training()
    adapters_learn_from_a_teacher()
    each_rank_may_have_a_disk_of_its_own()
    a_student_of_some_layers_starts_from_their_weights()
    dist.destroy()


if __name__ == "__main__":
    main()
