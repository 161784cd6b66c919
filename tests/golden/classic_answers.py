"""Run under Transformers 4 (by tests/unit/qa/decoding/test_classic.py): answers of `compute_predictions_logits`.

Reads {questions, vocabulary, max_seq_length, doc_stride, max_query_length, n_best_size, max_answer_length, v2,
threshold} and logits; writes {answers, null_odds, input_ids, texts}; `texts` are its final texts of the given pairs.
"""

import json
import sys
from types import SimpleNamespace

import numpy as np
from transformers import BertTokenizer
from transformers.data.metrics.squad_metrics import compute_predictions_logits, get_final_text
from transformers.data.processors import squad


def main(task_path, logits_path, out_path, odds_path):
    with open(task_path, encoding="utf-8") as file:
        task = json.load(file)
    tokenizer = BertTokenizer(task["vocabulary"], do_lower_case=task["do_lower_case"])
    squad.squad_convert_example_to_features_init(tokenizer)
    examples = [squad.SquadExample(i, q, c, None, None, "t") for i, q, c in task["questions"]]
    features = []
    for index, example in enumerate(examples):
        for feature in squad.squad_convert_example_to_features(
            example, task["max_seq_length"], task["doc_stride"], task["max_query_length"], "max_length", False
        ):
            feature.example_index, feature.unique_id = index, len(features)
            features.append(feature)
    logits = np.load(logits_path)
    assert len(features) == len(logits["start"]), (len(features), len(logits["start"]))
    results = [
        SimpleNamespace(unique_id=i, start_logits=start.tolist(), end_logits=end.tolist())
        for i, (start, end) in enumerate(zip(logits["start"], logits["end"], strict=True))
    ]
    answers = compute_predictions_logits(
        examples,
        features,
        results,
        task["n_best_size"],
        task["max_answer_length"],
        task["do_lower_case"],
        None,
        None,
        odds_path,
        False,
        task["v2"],
        task["threshold"],
        tokenizer,
    )
    odds = {}
    if task["v2"]:
        with open(odds_path) as file:
            odds = json.load(file)
    texts = [get_final_text(predicted, original, task["do_lower_case"]) for predicted, original in task["pairs"]]
    input_ids = [[i for i in feature.input_ids if i != tokenizer.pad_token_id] for feature in features]
    with open(out_path, "w") as file:
        json.dump({"answers": answers, "null_odds": odds, "input_ids": input_ids, "texts": texts}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
