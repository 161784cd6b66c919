"""One rank that evaluates 1 to 17 questions, whole and partitioned: `-m tests.distributed.evaluations TASK.json`.

The task: `options` of an evaluation, `sizes`, `folder` (files go to folder/CONFIG-SIZE), and, to try what happens then,
`dies`: [rank, forward pass] at which that rank ends at once.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine import ds_config, zero3_loading
from qa_deepspeed.engine.device import choose_device
from qa_deepspeed.engine.engine import EvalModel, evaluation_model
from qa_deepspeed.models.facts import model_facts
from qa_deepspeed.qa.features.families import model_columns
from qa_deepspeed.training.evaluation.evaluate import EvaluationData, evaluate
from qa_deepspeed.training.features import load_features
from qa_deepspeed.utils import dist
from qa_deepspeed.utils.errors import UserError


def evaluate_sizes(task: dict[str, Any], config_name: str) -> None:
    """Evaluate each number of questions with one loaded model."""
    options = RunOptions(**task["options"], deepspeed_config=config_name)
    device = choose_device(no_cuda=True)
    resolved = ds_config.resolve(options, dist.world_size(), "cpu")
    facts = model_facts(options)
    data: dict[int, EvaluationData] = {}
    for size in task["sizes"]:
        one = RunOptions(**task["options"], max_eval_examples=size)
        store = load_features(one, "evaluate", facts)
        data[size] = EvaluationData(store, facts.layout(frozenset({"token_type_ids"}), 0), facts.tokenizer)
    dist.init(device, 60)
    config = ds_config.finish(resolved, 1, ds_config.hidden_size(facts.config))
    model, _ = zero3_loading.load(options, facts.config, config)
    assert "token_type_ids" in model_columns(model, facts.config)
    model_of_rank = evaluation_model(model, config, resolved, device)
    if task.get("dies"):
        _die(model_of_rank, *task["dies"])
    for size in task["sizes"]:
        folder = Path(task["folder"]) / f"{config_name}-{size}"
        folder.mkdir(exist_ok=True)
        evaluate(model_of_rank, data[size], options, folder)


def _die(model_of_rank: EvalModel, rank: int, at: int) -> None:
    forward, done = model_of_rank.eval_forward, 0

    def counted(inputs: Any) -> Any:
        nonlocal done
        done += 1
        if dist.rank() == rank and done == at:
            os._exit(7)
        return forward(inputs)

    model_of_rank.eval_forward = counted  # type: ignore[method-assign]


def main(path: str) -> None:
    """Both configs, one after the other."""
    task = json.loads(Path(path).read_text())
    dist.ensure_rank_env()
    for config_name in task["configs"]:
        evaluate_sizes(task, config_name)
    dist.destroy()


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except UserError as error:
        sys.exit(f"error: {error}")
