"""Answers of the question-answering pipeline of Transformers 4: run by that version's own Python, not by this one's.

Reads a JSON object from the standard input: model, questions, contexts and calls (a list of keyword arguments, each
with `every`, to answer only every so many-th question). Writes a JSON list to the file named on the command line: for
each call the list of its answers.
"""

import json
import sys
import time

import torch
import transformers

work = json.load(sys.stdin)
torch.set_num_threads(int(work.get("threads", 1)))
transformers.logging.set_verbosity_error()
answerer = transformers.pipeline(
    "question-answering", model=work["model"], device=work.get("device", "cpu"), dtype=torch.float32
)
results = []
for call in work["calls"]:
    every = call.pop("every")
    questions, contexts = work["questions"][::every], work["contexts"][::every]
    began, used = time.perf_counter(), time.process_time()
    answers = answerer(question=questions, context=contexts, **call)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    results.append({"answers": answers, "seconds": seconds, "processor_seconds": used})
with open(sys.argv[1], "w", encoding="utf-8") as file:
    json.dump({"transformers": transformers.__version__, "results": results}, file)
