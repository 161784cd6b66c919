"""QuestionAnswerer: the pipeline's rules, written naively; forms of input; offsets; the stored threshold."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qa_deepspeed import QuestionAnswerer, pipeline
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.trained_settings import store_settings
from qa_deepspeed.qa.features.build import FeatureSettings
from qa_deepspeed.utils.errors import UserError
from tests.paths import DATA, REPOSITORY, needs_real_data
from tests.unit import small_tokenizers
from tests.unit.qa.features.test_parity import mixed_text

SIZES: dict[str, dict[str, int]] = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "roberta": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 600,
    },
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
    "qwen2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    },
}


@cache
def answerer(name: str) -> QuestionAnswerer:
    """A small model of this type with random weights, large enough that no two answers have the same score."""
    tokenizer = copy.deepcopy(small_tokenizers.tokenizer(name))
    tokenizer.model_max_length = 512
    config = transformers.AutoConfig.for_model(name, vocab_size=len(tokenizer), **SIZES[name])
    transformers.set_seed(1)
    model = transformers.AutoModelForQuestionAnswering.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return QuestionAnswerer(model, tokenizer, device="cpu")


QUESTION = "Who wrote it, and when?"
CONTEXT = (
    "It was written in 1874 by a lady of Weimar. Naïve façades 😀 smiles e\u0301 an accent; it's isn't, $1,234.56 (or "
    "more). The Rhine rises in the Swiss canton of Graubünden and flows through Germany to the North Sea."
)


def plain_answers(
    name: str,
    question: str,
    context: str,
    top_k: int,
    longest: int,
    align: bool,
    impossible: bool,
    max_seq_len: int,
    overlap: int,
) -> list[dict[str, Any]]:
    """The pipeline's rules, naively: windows one by one from the tokenizer itself, every pair of tokens scored."""
    qa = answerer(name)
    tokenizer = qa.tokenizer
    rows = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=max_seq_len,
        stride=overlap,
        padding=False,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=name == "bert",
    )
    null_score, found = 1e6, []
    for number, ids in enumerate(rows["input_ids"]):
        inputs = {"input_ids": torch.tensor([ids])}
        if name == "bert":  # the tokenizers library forgets the type ids of rows after the first
            inputs["token_type_ids"] = torch.tensor([[int(text == 1) for text in rows.sequence_ids(number)]])
            inputs["token_type_ids"][0, -1] = 1
        with torch.inference_mode():
            out = qa.model(**inputs)
        inside = np.array([text == 1 for text in rows.sequence_ids(number)])
        allowed = inside | (np.array(ids) == tokenizer.cls_token_id)
        probabilities = []
        for logits in (out.start_logits[0].double().numpy(), out.end_logits[0].double().numpy()):
            weights = np.where(allowed, np.exp(logits - logits[allowed].max()), 0.0)
            probabilities.append(weights / weights.sum())
        null_score = min(null_score, probabilities[0][0] * probabilities[1][0])
        spans = [
            (probabilities[0][s] * probabilities[1][e], s, e)
            for s in np.flatnonzero(inside)
            for e in np.flatnonzero(inside)
            if s <= e < s + longest
        ]
        words, offsets = rows.word_ids(number), rows["offset_mapping"][number]
        for score, s, e in sorted(spans, reverse=True)[: 2 * top_k + 10 if align else top_k]:
            if align:
                s = min(at for at in np.flatnonzero(inside) if words[at] == words[s])
                e = max(at for at in np.flatnonzero(inside) if words[at] == words[e])
            begin, end = offsets[s][0], offsets[e][1]
            text = context[begin:end]
            begin, end = begin + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
            same = [one for one in found if one["answer"].lower() == text.strip().lower()]
            if same:
                same[0]["score"] += score
            else:
                found.append({"score": score, "start": begin, "end": end, "answer": text.strip()})
    if impossible:
        found.append({"score": null_score, "start": 0, "end": 0, "answer": ""})
    return sorted(found, key=lambda one: -one["score"])[:top_k]


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("impossible", [True, False])
@pytest.mark.parametrize(("max_seq_len", "overlap"), [(384, 128), (60, 20)])
def test_answers_follow_the_rules_of_the_pipeline(
    name: str, align: bool, impossible: bool, max_seq_len: int, overlap: int
) -> None:
    for top_k, longest in ((1, 15), (4, 3)):
        expected = plain_answers(name, QUESTION, CONTEXT, top_k, longest, align, impossible, max_seq_len, overlap)
        found = answerer(name)(
            question=QUESTION,
            context=CONTEXT,
            top_k=top_k,
            max_answer_len=longest,
            align_to_words=align,
            handle_impossible_answer=impossible,
            max_seq_len=max_seq_len,
            doc_stride=overlap,
        )
        found = found if isinstance(found, list) else [found]
        for one, other in zip(expected, found, strict=True):
            assert other["score"] == pytest.approx(one.pop("score"), abs=1e-5)
            assert {key: other[key] for key in one} == one


def test_results_do_not_depend_on_the_other_questions() -> None:
    """Windows of several questions share a batch, and every answer equals that of the question alone."""
    texts = [CONTEXT, CONTEXT * 9, "Short one here.", CONTEXT[40:]]
    for name in SIZES:
        qa = answerer(name)
        together = qa(question=[QUESTION] * len(texts), context=texts, top_k=3, handle_impossible_answer=True)
        for text, answers in zip(texts, together, strict=True):
            alone = qa(question=QUESTION, context=text, top_k=3, handle_impossible_answer=True, batch_size=1)
            assert [one["answer"] for one in alone] == [one["answer"] for one in answers]
            assert [one["score"] for one in alone] == pytest.approx([one["score"] for one in answers], abs=1e-5)


@pytest.mark.parametrize("rope", ["default", "dynamic", "longrope"])
def test_results_do_not_depend_on_the_number_of_threads(rope: str, threads_put_back: None) -> None:
    """Batches run in parallel, except where a forward pass changes the model."""
    tokenizer = answerer("qwen2").tokenizer
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0} | (factors if rope == "longrope" else {})
    config = transformers.AutoConfig.for_model(
        "qwen2",
        vocab_size=len(tokenizer),
        max_position_embeddings=64 if rope == "dynamic" else 512,
        rope_parameters=parameters,
        **SIZES["qwen2"],
    )
    transformers.set_seed(1)
    qa = QuestionAnswerer(transformers.AutoModelForQuestionAnswering.from_config(config), tokenizer, device="cpu")
    seen: set[int] = set()
    qa.model.register_forward_pre_hook(lambda module, inputs: seen.add(threading.get_ident()))
    questions, contexts = [QUESTION] * 30, [CONTEXT[: 40 + 5 * number] for number in range(30)]
    lengths = {} if rope == "default" else {"max_seq_len": 60 if rope == "dynamic" else 120}
    results = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        results.append(qa(question=questions, context=contexts, batch_size=2, **lengths))
    assert (seen == {threading.get_ident()}) == (rope != "default")
    for one, other in zip(*results, strict=True):
        assert one == {**other, "score": pytest.approx(other["score"], rel=1e-4)}


def test_every_form_of_input_gives_the_same_result() -> None:
    qa = answerer("bert")
    row = {"question": QUESTION, "context": CONTEXT}
    one = qa(question=QUESTION, context=CONTEXT)
    assert list(one) == ["score", "start", "end", "answer"]
    assert qa(row) == qa([row]) == qa(QUESTION, CONTEXT) == one
    assert qa(question=[QUESTION], context=[CONTEXT]) == qa(question=[QUESTION], context=CONTEXT) == one
    pair = qa([row, {**row, "context": CONTEXT[20:]}])
    assert qa(question=[QUESTION] * 2, context=[CONTEXT, CONTEXT[20:]]) == pair
    assert pair[0]["answer"] == one["answer"] and isinstance(pair, list)
    assert qa(question=[QUESTION] * 2, context=CONTEXT) == qa([row, row]) == qa(row, row)
    assert list(qa(row for row in [row, row])) == qa([row, row])
    assert qa([]) == []
    assert qa(question=QUESTION, context=CONTEXT, padding="max_length", num_workers=2) == one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": QUESTION}, "pass question= and context="),
        ({"question": "", "context": "x"}, "no question"),
        ({"question": QUESTION, "context": ""}, "no context"),
        ({"question": [QUESTION] * 2, "context": ["x"] * 3}, "2 questions but 3 contexts"),
        ({"question": QUESTION, "context": "x", "top_k": 0}, "top_k must be at least 1, not 0"),
        ({"question": QUESTION, "context": "x", "top_k": None}, "top_k must be a whole number, not None"),
        ({"question": QUESTION, "context": "x", "max_answer_len": "2"}, "max_answer_len must be a whole number"),
        ({"question": QUESTION, "context": "x", "n_best_size": 2.5}, "n_best_size must be a whole number, not 2.5"),
        ({"question": QUESTION, "context": "x", "batch_size": -1}, "batch_size must be at least 1, not -1"),
        ({"question": QUESTION, "context": "x", "max_seq_len": [64]}, "max_seq_len must be a whole number"),
        ({"question": QUESTION, "context": "x", "doc_stride": -1}, "doc_stride must be at least 0, not -1"),
        ({"question": QUESTION, "context": "x", "max_question_len": 0}, "max_question_len must be at least 1, not 0"),
        ({"question": QUESTION, "context": "x", "top_k": 2, "n_best_size": 2}, "omit top_k"),
        ({"question": QUESTION, "context": "x", "max_seq_len": 20, "doc_stride": 20}, "no room"),
        ({"question": QUESTION, "context": "x", "max_seq_len": 10**6}, "positions of the model"),
        ({"question": QUESTION, "context": "x", "max_answer_length": "2"}, "max_answer_len must be a whole number"),
        (
            {"question": QUESTION, "context": "x", "align_to_words": "no"},
            "align_to_words must be True or False, not 'no'",
        ),
        ({"question": QUESTION, "context": "x", "handle_impossible_answer": 1}, "must be True or False, not 1"),
        (
            {"question": QUESTION, "context": "x", "doc_stride_is": "shared"},
            "must be 'step' or 'overlap', not 'shared'",
        ),
        (
            {"question": QUESTION, "context": "x", "max_seq_len": 9, "max_seq_length": 9},
            "is another name of max_seq_len",
        ),
    ],
)
def test_an_invalid_argument_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        answerer("bert")(**arguments)


@pytest.mark.parametrize(
    ("name", "meant"), [("topk", "top_k"), ("max_answer_lenght", "max_answer_length"), ("max_seqlen", "max_seq_len")]
)
def test_an_unknown_argument_is_refused_with_the_one_that_is_meant(name: str, meant: str) -> None:
    expected = f"takes no argument '{name}'; did you mean '{meant}'"
    with pytest.raises(TypeError, match=f"QuestionAnswerer {expected}"):
        answerer("bert")(question=QUESTION, context="x", **{name: 2})
    with pytest.raises(TypeError, match=f"pipeline {expected}"):
        pipeline("question-answering", "no-such-folder", **{name: 2})


def test_both_spellings_of_an_argument_mean_the_same() -> None:
    pipelines = {"max_seq_len": 40, "doc_stride": 8, "max_answer_len": 2, "max_question_len": 9, "batch_size": 1}
    trainings = dict(zip(("max_seq_length", "doc_stride", "max_answer_length", "max_query_length",
                          "per_gpu_eval_batch_size"), pipelines.values(), strict=True))  # fmt: skip
    qa, asked = answerer("bert"), {"question": QUESTION, "context": CONTEXT}
    said = "max_seq_length 40, doc_stride 8 (overlap), max_query_length 9, max_answer_length 2, "
    assert qa(**asked, **pipelines) == qa(**asked, **trainings) != qa(**asked)
    assert qa.describe(**pipelines) == qa.describe(**trainings) == f"{said}always an answer"
    both = [qa(**asked, **{name: True}) for name in ("handle_impossible_answer", "version_2_with_negative")]
    assert both[0] == both[1]
    assert qa.describe(**trainings, version_2_with_negative=True) == f"{said}null_score_diff_threshold 0"
    with pytest.raises(TypeError, match="describe takes no argument 'max_lenght'"):
        qa.describe(max_lenght=3)


def test_the_pipeline_takes_defaults_in_either_spelling(saved: Path) -> None:
    made = pipeline("question-answering", str(saved), max_answer_length=2)
    asked = {"question": QUESTION, "context": CONTEXT}
    assert made(**asked) == answerer("bert")(**asked, max_answer_len=2)
    assert (
        made(**asked, max_answer_len=9)
        == made(**asked, max_answer_length=9)
        == answerer("bert")(**asked, max_answer_len=9)
    )


def test_an_unknown_argument_without_a_similar_one_is_refused_alone() -> None:
    with pytest.raises(TypeError, match="takes no argument 'zzz'$"):
        answerer("bert")(question=QUESTION, context="x", zzz=2)


def test_whole_numbers_of_numpy_are_accepted() -> None:
    found = answerer("bert")(question=QUESTION, context=CONTEXT, top_k=np.int64(2), batch_size=np.int32(1))
    assert found == answerer("bert")(question=QUESTION, context=CONTEXT, top_k=2, batch_size=1)


def test_a_context_without_tokens_gets_the_empty_answer() -> None:
    found = answerer("bert")(question=[QUESTION] * 2, context=[" \n ", CONTEXT])
    assert found[0] == {"score": 1.0, "start": 0, "end": 0, "answer": ""}
    assert found[1] == answerer("bert")(question=QUESTION, context=CONTEXT)


def test_a_question_without_room_for_context_is_truncated() -> None:
    """Only as far as windows need room; the pipeline of Transformers raises an error."""
    found = answerer("bert")(question=QUESTION * 100, context=CONTEXT, max_seq_len=64, doc_stride=16)
    assert CONTEXT[found["start"] : found["end"]] == found["answer"] != ""


def test_the_stored_threshold_decides_whether_there_is_an_answer() -> None:
    qa = copy.copy(answerer("bert"))
    odds = qa(question=QUESTION, context=CONTEXT, n_best_size=3)["null_odds"]
    plain = qa(question=QUESTION, context=CONTEXT)
    for threshold, answer in ((odds + 0.1, plain["answer"]), (odds - 0.1, "")):
        qa.threshold = threshold
        assert qa(question=QUESTION, context=CONTEXT)["answer"] == answer
        two = qa(question=QUESTION, context=CONTEXT, top_k=2)
        assert two[0]["answer"] == answer and plain["answer"] in {one["answer"] for one in two}
        assert qa(question=QUESTION, context=CONTEXT, handle_impossible_answer=False) == plain


def null_logits(qa: QuestionAnswerer, question: str, context: str) -> tuple[float, float]:
    """Both logits of the first token, by a plain forward pass over a context of one window."""
    with torch.inference_mode():
        outputs = qa.model(**qa.tokenizer(question, context, return_tensors="pt"))
    return float(outputs.start_logits[0, 0]), float(outputs.end_logits[0, 0])


def test_the_n_best_list_is_the_best_spans_and_the_null_entry() -> None:
    found = answerer("bert")(question=QUESTION, context=CONTEXT, n_best_size=4)
    spans = [entry for entry in found["nbest"] if entry["text"]]
    null = next(entry for entry in found["nbest"] if not entry["text"])
    assert len(spans) == 4 and sum(entry["probability"] for entry in found["nbest"]) == pytest.approx(1)
    scores = [entry["start_logit"] + entry["end_logit"] for entry in spans]
    assert scores == sorted(scores, reverse=True)
    assert found["null_odds"] == pytest.approx(null["start_logit"] + null["end_logit"] - scores[0], abs=1e-5)
    assert (null["start_logit"], null["end_logit"]) == pytest.approx(null_logits(answerer("bert"), QUESTION, CONTEXT))
    assert all(CONTEXT[entry["start"] :].startswith(entry["text"]) for entry in spans)


@pytest.mark.parametrize("name", SIZES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(context=mixed_text, question=mixed_text.filter(lambda text: text.strip()), align=st.booleans())
def test_offsets_slice_the_context_to_the_answer(name: str, context: str, question: str, align: bool) -> None:
    """Texts hold emoji, combining marks, control characters and scripts without blanks."""
    if not context:
        return
    found = answerer(name)(
        question=question[:40],
        context=context,
        align_to_words=align,
        top_k=5,
        max_seq_len=256,
        doc_stride=32,
        handle_impossible_answer=True,
    )
    for one in found if isinstance(found, list) else [found]:
        assert context[one["start"] : one["end"]] == one["answer"] == one["answer"].strip()
        assert 0 <= one["start"] <= one["end"] <= len(context) and 0 <= one["score"] <= 1 + 1e-5


@pytest.mark.real
@needs_real_data
def test_offsets_are_exact_on_japanese_text() -> None:
    articles = json.loads((DATA / "ja-v1-sample.json").read_text())["data"]
    rows = [
        {"question": question["question"], "context": paragraph["context"]}
        for article in articles[:4]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    for align in (True, False):
        found = answerer("qwen2")(rows, align_to_words=align)
        assert len(found) == len(rows) > 50
        for row, one in zip(rows, found, strict=True):
            assert row["context"][one["start"] : one["end"]] == one["answer"] != ""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    answerer("bert").model.save_pretrained(folder)
    answerer("bert").tokenizer.save_pretrained(folder)
    return folder


def test_a_saved_model_is_loaded_with_its_threshold(saved: Path, tmp_path: Path) -> None:
    qa = pipeline("question-answering", model=str(saved), device=-1)
    assert qa.threshold is None
    wanted, found = (one(question=QUESTION, context=CONTEXT) for one in (answerer("bert"), qa))
    assert found == {**wanted, "score": pytest.approx(wanted["score"], abs=1e-6)}
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "null_score_diff_threshold": -1000.0}))
    assert QuestionAnswerer.from_pretrained(str(tmp_path))(question=QUESTION, context=CONTEXT)["answer"] == ""


def test_a_tokenizer_of_another_folder_is_used(saved: Path, tmp_path: Path) -> None:
    """By its folder or loaded; a loaded model needs one."""
    bert = answerer("bert")
    wanted = bert(question=QUESTION, context=CONTEXT)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((saved / file).read_bytes())
    for model, tokenizer in ((str(tmp_path), str(saved)), (str(tmp_path), bert.tokenizer), (bert.model, str(saved))):
        found = pipeline("question-answering", model=model, tokenizer=tokenizer, device=-1)
        given = found(question=QUESTION, context=CONTEXT)
        assert given == {**wanted, "score": pytest.approx(wanted["score"], abs=1e-6)}
    with pytest.raises(UserError, match="together with tokenizer="):
        pipeline("question-answering", model=bert.model)


def test_a_pipeline_takes_defaults_for_its_calls(saved: Path) -> None:
    bert = answerer("bert")
    made = pipeline(
        "question-answering",
        str(saved),
        device=-1,
        top_k=3,
        max_answer_len=4,
        framework="pt",
        use_fast=True,
        num_workers=0,
    )
    answers = [one["answer"] for one in bert(question=QUESTION, context=CONTEXT, top_k=3, max_answer_len=4)]
    assert [one["answer"] for one in made(question=QUESTION, context=CONTEXT)] == answers
    assert [one["answer"] for one in made(question=QUESTION, context=CONTEXT, top_k=2)] == answers[:2]
    with pytest.raises(TypeError, match="takes no argument 'device_map'"):
        pipeline("question-answering", str(saved), device_map="auto")


def test_a_model_without_a_trained_head_is_refused(saved: Path, tmp_path: Path) -> None:
    transformers.BertModel(answerer("bert").model.config).save_pretrained(tmp_path)
    answerer("bert").tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no trained question-answering head"):
        QuestionAnswerer.from_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="'question-answering' only"):
        pipeline("fill-mask", model=str(saved))


def test_it_needs_neither_deepspeed_nor_a_launcher(saved: Path) -> None:
    """Importing the package loads no heavy library; answering loads neither deepspeed nor datasets."""
    code = (
        "import sys, qa_deepspeed; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.modules['deepspeed'] = None\n"
        f"print(qa_deepspeed.QuestionAnswerer.from_pretrained({str(saved)!r})({QUESTION!r}, {CONTEXT!r})['answer'])\n"
        "assert 'datasets' not in sys.modules"
    )
    environment = {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert printed.strip() == answerer("bert")(QUESTION, CONTEXT)["answer"]


@pytest.mark.parametrize("stride_is", ["step", "overlap"])
def test_settings_of_the_training_are_the_defaults(stride_is: str) -> None:
    """Windows and the longest answer as in the model's config, unless an argument says otherwise."""
    one = answerer("bert")
    settings = RunOptions(
        max_seq_length=40, doc_stride=6, doc_stride_is=stride_is, max_query_length=9, max_answer_length=2
    )
    store_settings(one.model.config, settings)
    try:
        trained = QuestionAnswerer(one.model, one.tokenizer)
    finally:
        delattr(one.model.config, "qa_settings")
    found = trained._window_settings(None, None, None)
    assert found == FeatureSettings(40, 6, stride_is, 9)  # type: ignore[arg-type]
    long_context = " ".join([CONTEXT] * 4)
    best = trained(question=QUESTION, context=long_context, n_best_size=5)
    assert best == trained(question=QUESTION, context=long_context, n_best_size=5, max_answer_len=2)
    assert trained._window_settings(50, 8, None) == FeatureSettings(50, 8, stride_is, 9)  # type: ignore[arg-type]
    assert trained._window_settings(None, 8, None, "overlap").doc_stride_is == "overlap"
    assert trained._window_settings(60, None, None).doc_stride == 6
    assert trained._window_settings(16, None, None).doc_stride == 8  # the trained stride does not fit
    assert trained._window_settings(30, 25, None).max_query_length < 9  # the question yields to the stride
    plain = QuestionAnswerer(one.model, one.tokenizer)
    assert plain._window_settings(None, None, None) == one._window_settings(None, None, None)
    del trained._trained["max_query_length"]  # a config that lacks one of them, or was edited
    assert trained._window_settings(None, None, None).doc_stride_is == "overlap"


def test_an_answerer_shows_its_model() -> None:
    qa = copy.copy(answerer("bert"))
    size = sum(parameter.numel() for parameter in qa.model.parameters())
    assert repr(qa) == f"QuestionAnswerer(BertForQuestionAnswering, {size:,} parameters, torch.float32 on cpu)"
    qa.threshold = -1.5
    assert repr(qa).endswith("on cpu, null threshold -1.5)")
