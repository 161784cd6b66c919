"""Run by test_python: calls of `train` and `evaluate` one after the other in one process, as in a notebook.

Arguments: a folder, and the options of a run as JSON. What the calls returned is printed as JSON in a line of its own,
by rank 0 of several.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from qa_deepspeed import Preempted, RunOptions, UserError, evaluate, train

folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
variables, handlers = set(os.environ), signal.getsignal(signal.SIGINT)
called: list[list[Any]] = []


def shown(result: Any) -> dict[str, Any]:
    return {"metrics": result.metrics, "history": result.history, "folder": str(result.folder), "repr": repr(result)}


def models_in_memory() -> int:
    gc.collect()  # of a call that ended with an exception, as the next call would
    return sum(type(one).__name__.endswith("ForQuestionAnswering") for one in gc.get_objects())


def press_ctrl_c(step: int, values: dict[str, float]) -> None:
    if step == 3:
        os.kill(os.getpid(), signal.SIGINT)


found: dict[str, Any] = {}
found["first"] = shown(
    train(
        **options,
        output_dir=folder / "first",
        on_log=lambda step, values: called.append(["log", step, values["train/loss"]]),
        on_evaluate=lambda step, metrics: called.append(["evaluate", step, metrics["f1"]]),
        on_save=lambda step, saved: called.append(["save", step, saved.name]),
    )
)
try:
    train(**options, output_dir=folder / "first", learning_rat=1e-4)
except UserError as error:
    found["unknown"] = str(error)
try:
    train(RunOptions(**options), output_dir=str(folder / "none"), train_file="nowhere.json")
except UserError as error:
    found["no file"] = str(error)
try:
    train(RunOptions(**options), output_dir=folder / "second", on_log=press_ctrl_c)
except Preempted as error:
    found["preempted"] = str(error)
found["models"] = [models_in_memory()]
found["second"] = shown(train(RunOptions(**options, output_dir=str(folder / "second"))))
found["again"] = shown(train(**options, output_dir=folder / "first"))
data = {"predict_file": [options["predict_file"]], "cache_dir": options["cache_dir"]}
found["evaluated"] = shown(evaluate(model_name_or_path=folder / "first", **data))
found["models"].append(models_in_memory())
for stage in ("zero1", "zero3"):
    train(**{**options, "deepspeed_config": stage, "max_steps": 2}, output_dir=folder / stage)
    evaluate(model_name_or_path=folder / stage, deepspeed_config=stage, **data)
    found["models"].append(models_in_memory())
found |= {
    "called": called,
    "variables": sorted(set(os.environ) - variables),
    "handlers kept": signal.getsignal(signal.SIGINT) is handlers,
}
if os.environ.get("RANK", "0") == "0":  # of several ranks
    print(json.dumps(found))
