"""One rank that trains adapters: `-m tests.distributed.lora_scenes OPTIONS.json FOLDER`. Every rank asserts."""

import json

import numpy as np
import torch
from peft import AutoPeftModel
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from qa_deepspeed.cli.inference.export import export
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.engine.checkpoints.checkpoint import full_weights
from qa_deepspeed.engine.checkpoints.checkpoint_files import MODEL_FOLDER
from qa_deepspeed.inference.answerer import QuestionAnswerer
from qa_deepspeed.models.lora import WEIGHTS_FILE
from qa_deepspeed.runs.verify import MERGED_TOLERANCE, largest_difference, load_reference_outputs
from qa_deepspeed.training.evaluation.evaluate import evaluate_run
from qa_deepspeed.utils import dist
from tests.distributed.checkpoint_scenes import FOLDER, OPTIONS, on_first, run, same_states
from tests.distributed.launching import losses

STAGES = ("zero0", "zero1", "zero2", "zero3")


def every_stage_trains_the_same_adapters() -> None:
    """Only adapters and head are in the optimizer; losses are those of stage 0, and fall."""
    for stage in STAGES:
        printed = run(stage, deepspeed_config=stage)
        assert "LoRA: " in printed and "parameters are trained" in printed, printed
    if not dist.is_rank_zero():
        return
    first, tensors = losses(FOLDER / "zero0"), load_file(FOLDER / "zero0" / WEIGHTS_FILE)
    assert first[-1] < first[0]
    base = load_file(OPTIONS["model_name_or_path"] + "/model.safetensors")
    for stage in STAGES:
        np.testing.assert_allclose(losses(FOLDER / stage), first, rtol=1e-5)
        found = load_file(FOLDER / stage / WEIGHTS_FILE)
        assert found.keys() == tensors.keys() and all("lora_" in name or "qa_outputs" in name for name in found)
        for name in found:
            torch.testing.assert_close(found[name], tensors[name], rtol=1e-4, atol=1e-6)
        assert not (FOLDER / stage / "model.safetensors").exists()
        weights = full_weights(FOLDER / stage / "checkpoint-2")
        for name in base:
            own = name if name in weights else name.replace(".weight", ".base_layer.weight")
            own = own if own in weights else name.replace(".bias", ".base_layer.bias")
            assert torch.equal(weights[own], base[name]) == ("qa_outputs" not in name), name
        assert json.loads((FOLDER / stage / "run.json").read_text())["proof"]["rows"] == 4


def a_stopped_run_ends_with_the_same_bytes() -> None:
    """From the same stage to the bit; from another to rounding; with other adapters not at all."""
    for stage in STAGES:
        whole = (FOLDER / stage / WEIGHTS_FILE).read_bytes()
        on_first(lambda stage=stage: unfinish(stage))
        printed = run(stage, deepspeed_config=stage)
        assert "step 2 of 4" in printed, printed
        assert (FOLDER / stage / WEIGHTS_FILE).read_bytes() == whole, stage
    on_first(lambda: unfinish("zero1"))
    printed = run("zero1", deepspeed_config="zero1", lora_alpha=8)
    assert "lora_alpha was 16, is 8" in printed, printed
    printed = run("zero1", deepspeed_config="zero3")
    assert "step 2 of 4" in printed, printed
    same_states("zero2", "zero1", 4)


def unfinish(name: str) -> None:
    """Make of a finished run one that ended after step 2."""
    folder = FOLDER / name
    (folder / "checkpoint-4/manifest.json").unlink()
    record = json.loads((folder / "run.json").read_text())
    del record["json_checksum"]  # else the change would be damage
    (folder / "run.json").write_text(json.dumps({**record, "status": "running"}))


def exports_answer_as_the_engine_did() -> None:
    """As an adapter, which peft loads; and merged, a plain model."""

    def check() -> None:
        for stage in ("zero0", "zero2", "zero3"):
            checkpoint = FOLDER / stage / "checkpoint-4"
            probe = load_reference_outputs(checkpoint, "fp32", "cpu")
            for merge in (False, True):
                out = FOLDER / f"exported-{stage}-{merge}"
                record = export(checkpoint, out, merge=merge)
                assert record["largest_difference"] <= MERGED_TOLERANCE, record
            plain, report = AutoModelForQuestionAnswering.from_pretrained(out, output_loading_info=True)
            assert not report["missing_keys"] and not report["unexpected_keys"]
            adapted = AutoPeftModel.from_pretrained(FOLDER / f"exported-{stage}-False")
            for model in (plain.eval(), adapted.eval()):
                assert largest_difference(model, probe) <= MERGED_TOLERANCE
        AutoTokenizer.from_pretrained(out)
        assert export(checkpoint, FOLDER / "half", "bf16", merge=True)["dtype"] == "bfloat16"
        question = {"question": "What is it?", "context": "It is a test of the adapters in this folder."}
        answers = [
            QuestionAnswerer.from_pretrained(str(FOLDER / name))(question)
            for name in ("zero3", "exported-zero3-False", "exported-zero3-True")
        ]
        assert len({answer["answer"] for answer in answers}) == 1
        np.testing.assert_allclose([answer["score"] for answer in answers], answers[0]["score"], rtol=1e-4)
        assert (checkpoint / MODEL_FOLDER / "config.json").is_file()

    on_first(check)


def the_adapter_is_evaluated_at_any_stage() -> None:
    """What the run itself found at its end."""
    expected = json.loads((FOLDER / "zero0/metrics.json").read_text())
    names = (
        "predict_file",
        "cache_dir",
        "version_2_with_negative",
        "max_seq_length",
        "doc_stride",
        "max_eval_examples",
    )
    for stage in ("zero0", "zero3"):
        given = {name: OPTIONS[name] for name in names} | {"deepspeed_config": stage}
        given |= {"model_name_or_path": str(FOLDER / "zero0"), "output_dir": str(FOLDER / f"again-{stage}")}
        found = evaluate_run(RunOptions(**given, given=frozenset(given)))
        assert (found["f1"], found["total"]) == (expected["f1"], expected["total"])


def half_precision_trains_too() -> None:
    """Also where parameters are created partitioned; what is saved is verified in either case."""
    for stage in ("zero2", "zero3"):
        run(f"half-{stage}", deepspeed_config=stage, bf16=True, max_steps=2, do_eval=False)
        if dist.is_rank_zero():
            found = load_file(FOLDER / f"half-{stage}" / WEIGHTS_FILE)
            assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
            assert np.abs(losses(FOLDER / f"half-{stage}") - losses(FOLDER / "zero0")[:2]).max() < 0.1
            out = FOLDER / f"half-{stage}-merged"
            assert "largest_difference" in export(FOLDER / f"half-{stage}" / "checkpoint-2", out, merge=True)


def main() -> None:
    """Play them all."""
    dist.ensure_rank_env()
    every_stage_trains_the_same_adapters()
    a_stopped_run_ends_with_the_same_bytes()
    exports_answer_as_the_engine_did()
    the_adapter_is_evaluated_at_any_stage()
    half_precision_trains_too()
    dist.destroy()


if __name__ == "__main__":
    main()
