"""Export to ONNX: onnxruntime gives the model's answers, with its windows and threshold; what cannot be exported."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qa_deepspeed import QuestionAnswerer
from qa_deepspeed.cli.inference import export_onnx
from qa_deepspeed.cli.main import main
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.inference.onnx_export import AnswerComparison, quantize_onnx_model
from qa_deepspeed.inference.onnx_model import OnnxModel
from qa_deepspeed.models.lora import LoraSettings, add_adapters, save_weights
from qa_deepspeed.models.trained_settings import store_settings
from qa_deepspeed.utils.errors import UserError
from tests.beam_models import make_model, write_questions
from tests.distributed.launching import environment
from tests.paths import DATA, MINILM, REPOSITORY, needs_real_data, needs_real_model
from tests.unit import small_tokenizers
from tests.unit.inference.test_answerer import CONTEXT, QUESTION

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} (the extra [onnx]) is not installed")

ENCODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": ENCODER,
    "roberta": {**ENCODER, "max_position_embeddings": 514, "pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64},
    "electra": {**ENCODER, "embedding_size": 16},
    "deberta-v2": {
        **ENCODER,
        "relative_attention": True,
        "position_buckets": 16,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    },
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
}
TYPES = {"bert", "electra"}
"""Families whose models have a use for token types."""

CONTEXTS = (CONTEXT, CONTEXT * 5, "Short one here.", CONTEXT[40:])


def save(name: str, folder: Path, **config: Any) -> Path:
    """A small model of this type with random weights, and its tokenizer."""
    tokenizer = copy.deepcopy(small_tokenizers.tokenizer(name))
    tokenizer.model_max_length = 512
    made = transformers.AutoConfig.for_model(name, vocab_size=len(tokenizer), **FAMILIES[name])
    for key, value in config.items():
        setattr(made, key, value)
    transformers.set_seed(1)
    model = transformers.AutoModelForQuestionAnswering.from_config(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def export(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["export", *map(str, arguments), "--format", "onnx"])
    return int(ended.value.code or 0)


def assert_equal_answers(found: Any, expected: Any) -> None:
    """Equal texts and places, scores and logits within rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_equal_answers(found[name], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal_answers(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    else:
        assert found == expected


SETTINGS = RunOptions(max_seq_length=60, doc_stride=20, doc_stride_is="step", max_query_length=16, max_answer_length=9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with settings of a training and a tuned null threshold."""
    config = transformers.BertConfig()
    store_settings(config, SETTINGS)
    return save(
        "bert",
        tmp_path_factory.mktemp("model"),
        qa_settings=config.qa_settings,
        null_score_diff_threshold=-1.25,
    )


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported")
    assert export(model, out) == 0
    return out


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "roberta" else pytest.mark.slow) for name in FAMILIES if name != "bert"],
)
def test_an_export_of_any_family_answers_as_the_model_does(name: str, tmp_path: Path) -> None:
    """Several questions in one batch and one alone, one window and many, padded and not."""
    model, out = save(name, tmp_path / "model"), tmp_path / "out"
    assert export(model, out) == 0
    ours, theirs = QuestionAnswerer.from_pretrained(str(out)), QuestionAnswerer.from_pretrained(str(model))
    assert isinstance(ours.model, OnnxModel)
    assert ours.model.columns == {"input_ids", "attention_mask"} | ({"token_type_ids"} if name in TYPES else set())
    for arguments in ({"n_best_size": 5}, {"top_k": 3, "max_seq_len": 60, "doc_stride": 20, "batch_size": 3}):
        asked = {"question": [QUESTION] * len(CONTEXTS), "context": list(CONTEXTS), **arguments}
        assert_equal_answers(ours(**asked), theirs(**asked))
    assert_equal_answers(ours(QUESTION, CONTEXT), theirs(QUESTION, CONTEXT))


def test_windows_threshold_and_settings_of_the_training_are_kept(model: Path, exported: Path) -> None:
    ours, theirs = QuestionAnswerer.from_pretrained(str(exported)), QuestionAnswerer.from_pretrained(str(model))
    assert ours.threshold == -1.25
    assert ours.describe() == theirs.describe()
    assert "max_seq_length 60, doc_stride 20 (step)" in ours.describe()
    asked = {"question": [QUESTION] * len(CONTEXTS), "context": list(CONTEXTS)}
    assert_equal_answers(ours(**asked, n_best_size=5), theirs(**asked, n_best_size=5))
    assert_equal_answers(
        ours(QUESTION, contexts=list(CONTEXTS), top_k=3), theirs(QUESTION, contexts=list(CONTEXTS), top_k=3)
    )
    record = json.loads((exported / "run.json").read_text())
    assert record["status"] == "exported"
    assert record["export"]["largest_difference"] <= record["export"]["tolerance"]
    assert record["export"]["windows"] > 10


def test_predict_runs_no_code_of_the_model(model: Path, exported: Path, tmp_path: Path) -> None:
    """Transformers' modelling code is not imported, torch's exporter and DeepSpeed are not either."""
    code = (
        "import sys\n"
        "for name in ('transformers.models.bert.modeling_bert', 'onnx', 'onnxscript', 'deepspeed'):\n"
        "    sys.modules[name] = None\n"
        "from qa_deepspeed.cli.main import main\n"
        f"main(['predict', '--model_name_or_path', {str(exported)!r}, '--question', {QUESTION!r}, '--context', "
        f"{CONTEXT!r}])"
    )
    path = [str(REPOSITORY), *(entry for entry in sys.path if entry)]
    environment = {"PYTHONPATH": ":".join(path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=True, timeout=200
    )
    answer = QuestionAnswerer.from_pretrained(str(model))(QUESTION, CONTEXT)
    assert json.loads(printed.stdout)["answer"] == answer["answer"]
    assert "max_seq_length 60" in printed.stderr


def squad(path: Path, answers: list[str]) -> Path:
    """A SQuAD v2 file with a question on each context and these gold answers, "" for none."""
    questions = [
        {
            "context": context,
            "qas": [
                {
                    "id": str(number),
                    "question": QUESTION,
                    "answers": [{"text": answer, "answer_start": context.index(answer)}] if answer else [],
                    "is_impossible": not answer,
                }
            ],
        }
        for number, (context, answer) in enumerate(zip(CONTEXTS, answers, strict=True))
    ]
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "one", "paragraphs": questions}]}))
    return path


def test_answers_to_a_file_are_compared_and_scored(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qa = QuestionAnswerer.from_pretrained(str(model))
    answers = [qa(QUESTION, context)["answer"] for context in CONTEXTS]
    expected = [answers[0], *("" if answer else "Weimar" for answer in answers[1:3]), answers[3]]
    expected[2] = "" if answers[2] else "one"
    file = squad(tmp_path / "dev.json", expected)
    assert export(model, tmp_path / "out", "--predict_file", file) == 0
    printed = capsys.readouterr().out
    assert "4 of 4 answers are equal; F1 50.00 before, 50.00 after; EM 50.00 before, 50.00 after" in printed
    assert json.loads((tmp_path / "out/run.json").read_text())["export"]["answers"]["f1"] == [50.0, 50.0]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_quantized_export_is_smaller_and_says_what_it_costs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of GPT-2, whose products with weights are no MatMul in the graph that torch exports."""
    import onnx

    model = save(name, tmp_path / "model")
    file = squad(tmp_path / "dev.json", ["Weimar", "Rhine", "one", ""])
    options = ("--quantize", "int8", "--predict_file", file, "--max_f1_loss", "100")
    assert export(model, tmp_path / "out", *options) == 0
    record = json.loads((tmp_path / "out/run.json").read_text())["export"]
    assert 1e-4 < record["quantized_difference"] < 0.5
    assert record["largest_difference"] <= 1e-4
    printed = capsys.readouterr().out
    assert (
        f"within {record['largest_difference']:.1e} in float32, {record['quantized_difference']:.1e} in int8" in printed
    )
    graph = onnx.load(tmp_path / "out/model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulInteger") >= 5
    assert "Gemm" not in kinds
    matrices = [one for one in graph.initializer if one.data_type == onnx.TensorProto.INT8 and len(one.dims) == 2]
    assert len(matrices) == kinds.count("MatMulInteger")
    assert QuestionAnswerer.from_pretrained(str(tmp_path / "out"))(QUESTION, CONTEXT)["score"] > 0


def test_a_model_in_two_files_is_run_and_quantized(exported: Path, tmp_path: Path) -> None:
    """As models of more than 2 GB are written."""
    import onnx

    folder = tmp_path / "two"
    shutil.copytree(exported, folder)
    names = {"model.onnx", "model.onnx.data"}
    onnx.save_model(
        onnx.load(exported / "model.onnx"),
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
    )
    expected = QuestionAnswerer.from_pretrained(str(exported))(QUESTION, CONTEXT, n_best_size=3)
    assert QuestionAnswerer.from_pretrained(str(folder))(QUESTION, CONTEXT, n_best_size=3) == expected
    assert {path.name for path in folder.glob("model*")} == names
    before = (folder / "model.onnx.data").stat().st_size
    quantize_onnx_model(folder)
    assert {path.name for path in folder.glob("model*")} == names
    assert (folder / "model.onnx.data").stat().st_size < before
    quantized = QuestionAnswerer.from_pretrained(str(folder))(QUESTION, CONTEXT, n_best_size=3)
    assert quantized["null_odds"] != expected["null_odds"]


def test_adapters_are_merged(model: Path, tmp_path: Path) -> None:
    tuned = transformers.BertForQuestionAnswering.from_pretrained(model)
    add_adapters(tuned, LoraSettings(rank=2, alpha=4, dropout=0.0, target_modules=("all-linear",)), str(model), 1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:  # zero at first
                parameter.normal_(0, 0.3)
    save_weights(tmp_path / "adapter", tuned, tuned.state_dict())
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "adapter")
    assert export(tmp_path / "adapter", tmp_path / "out") == 0
    expected = QuestionAnswerer.from_pretrained(str(tmp_path / "adapter"))(QUESTION, CONTEXT, n_best_size=5)
    found = QuestionAnswerer.from_pretrained(str(tmp_path / "out"))(QUESTION, CONTEXT, n_best_size=5)
    assert_equal_answers(found, expected)
    without = QuestionAnswerer.from_pretrained(str(model))(QUESTION, CONTEXT, n_best_size=5)
    assert without["null_odds"] != pytest.approx(expected["null_odds"], rel=1e-3)
    assert not (tmp_path / "out/adapter_config.json").exists()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused export prints."""
    capsys.readouterr()
    assert export(*arguments) != 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_an_export_with_other_logits_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = export_onnx.write_onnx_model

    def write_another(original: Any, batch: Any, folder: Path) -> None:
        changed = copy.deepcopy(original)
        with torch.no_grad():
            changed.qa_outputs.bias += 0.01
        write(changed, batch, folder)

    monkeypatch.setattr(export_onnx, "write_onnx_model", write_another)
    assert "logits differ by" in refused(capsys, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_costs_f1_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = squad(tmp_path / "dev.json", ["Weimar", "", "one", ""])
    found = AnswerComparison(4, 3, (75.0, 50.0), (80.0, 78.5))
    monkeypatch.setattr(export_onnx, "compare_answers", lambda *models_and_questions: found)
    line = refused(capsys, model, tmp_path / "out", "--predict_file", file)
    assert "costs 1.50 points of F1, more than 1" in line
    assert "3 of 4 answers are equal; F1 80.00 before, 78.50 after" in line
    assert not (tmp_path / "out").exists()
    assert export(model, tmp_path / "out", "--predict_file", file, "--max_f1_loss", "2") == 0
    assert json.loads((tmp_path / "out/run.json").read_text())["export"]["answers"]["f1"] == [80.0, 78.5]


def test_what_cannot_be_exported_is_refused_in_one_line(
    model: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_questions(tmp_path / "questions.json")
    for part in make_model("xlnet", tmp_path / "questions.json"):
        part.save_pretrained(tmp_path / "beam")  # type: ignore[attr-defined]
    assert "its beam head" in refused(capsys, tmp_path / "beam", tmp_path / "out")
    assert "is an ONNX export already" in refused(capsys, exported, tmp_path / "out")
    (full := tmp_path / "full").mkdir()
    (full / "other").touch()
    assert "is not empty" in refused(capsys, model, full)
    shutil.copytree(model, tmp_path / "checkpoint-1" / "model")
    assert "is a checkpoint" in refused(capsys, tmp_path / "checkpoint-1", tmp_path / "out")
    assert "no such file" in refused(capsys, model, tmp_path / "out", "--predict_file", tmp_path / "none.json")
    assert "--merge_lora is for" in refused(capsys, model, tmp_path / "out", "--merge_lora")
    assert "leave --dtype bf16 out" in refused(capsys, model, tmp_path / "out", "--dtype", "bf16")
    assert "needs --predict_file" in refused(capsys, model, tmp_path / "out", "--max_f1_loss", "2")
    assert "needs --predict_file" in refused(capsys, model, tmp_path / "out", "--quantize", "int8")
    rows = [json.dumps({"id": str(number), "question": QUESTION, "context": CONTEXT}) for number in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    options = ("--quantize", "int8", "--predict_file", tmp_path / "rows.jsonl")
    assert "has no gold answers" in refused(capsys, model, tmp_path / "out", *options)
    for package in ("onnxscript", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            line = refused(capsys, model, tmp_path / "out")
        assert package in line
        assert "pip install 'qa_deepspeed[onnx]'" in line
    assert not (tmp_path / "out").exists()


def test_an_export_is_used_on_the_cpu_in_its_own_precision(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="runs on the CPU"):
        QuestionAnswerer.from_pretrained(str(exported), device="cuda")
    with pytest.raises(UserError, match="leave dtype out"):
        QuestionAnswerer.from_pretrained(str(exported), dtype="bfloat16")
    damaged = tmp_path / "damaged"
    shutil.copytree(exported, damaged)
    (damaged / "model.onnx").write_bytes((exported / "model.onnx").read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read by onnxruntime"):
        QuestionAnswerer.from_pretrained(str(damaged))


EVALUATE = """
import sys
from qa_deepspeed import evaluate
for name in ("model", "exported"):
    evaluate(
        model_name_or_path=sys.argv[1 + (name == "exported")], predict_file=sys.argv[3], output_dir=name,
        version_2_with_negative=True, gather="full", n_best_size=5, report_to="none", deepspeed_config="zero0",
    )
for wrong in ({"bf16": True}, {"eval_all_checkpoints": True}):
    try:
        evaluate(model_name_or_path=sys.argv[2], predict_file=sys.argv[3], output_dir="wrong", **wrong)
    except ValueError as error:
        print("refused:", error)
"""


def test_an_export_is_evaluated_as_the_model_is(model: Path, exported: Path, tmp_path: Path) -> None:
    """Answers, n-best lists, null odds and scores of `evaluate`, and what it refuses."""
    file = squad(tmp_path / "dev.json", ["Weimar", "", "one", "Rhine"])
    ran = subprocess.run(
        [sys.executable, "-c", EVALUATE, model, exported, file],
        env=environment(HOME=str(tmp_path)),
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{exported} is an ONNX export: onnxruntime runs it, on the CPU" in ran.stdout
    for name in ("predictions.json", "nbest_predictions.json", "null_odds.json", "metrics.json"):
        ours, theirs = (json.loads((tmp_path / folder / name).read_text()) for folder in ("exported", "model"))
        assert_equal_answers(ours, theirs)
    assert (tmp_path / "exported/report.html").exists() and (tmp_path / "exported/logits.npz").exists()
    refused = [line for line in ran.stdout.splitlines() if line.startswith("refused:")]
    assert len(refused) == 2
    assert "computes in its own precision: leave bf16 out" in refused[0] and "has no checkpoints" in refused[1]


def test_an_export_is_not_trained(exported: Path) -> None:
    from qa_deepspeed.models.loading import load_config, load_model

    options = RunOptions(model_name_or_path=str(exported))
    with pytest.raises(UserError, match="is an ONNX export"):
        load_model(options, load_config(options))


@pytest.mark.slow
@pytest.mark.real
@needs_real_data
@needs_real_model
def test_a_real_model_is_exported(tmp_path: Path) -> None:
    """MiniLM with a random head, on real questions."""
    transformers.set_seed(1)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(MINILM)
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(MINILM).save_pretrained(tmp_path / "model")
    data = json.loads((DATA / "en-v1-dev.json").read_text())
    article = data["data"][0]
    few = data | {"data": [article | {"paragraphs": article["paragraphs"][:3]}]}
    (tmp_path / "dev.json").write_text(json.dumps(few))
    assert export(tmp_path / "model", tmp_path / "out", "--predict_file", tmp_path / "dev.json") == 0
    record = json.loads((tmp_path / "out/run.json").read_text())["export"]
    assert record["largest_difference"] <= 1e-4
    assert record["answers"]["equal"] == record["answers"]["questions"] > 5
