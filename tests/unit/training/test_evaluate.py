"""The evaluation of a small model in one process: its options, checked against slow reference computations."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer

from qa_deepspeed.cli.data.sample import write_sample
from qa_deepspeed.cli.main import main
from qa_deepspeed.config.run_options import RunOptions
from qa_deepspeed.models.facts import model_facts
from qa_deepspeed.qa.decoding.classic import classic_text, decode_classic
from qa_deepspeed.qa.decoding.full_logits import FullLogits
from qa_deepspeed.qa.decoding.hf import decode_like_transformers
from qa_deepspeed.qa.decoding.predictions import DecodeSettings
from qa_deepspeed.qa.features.batching import make_batch
from qa_deepspeed.qa.features.families import model_columns
from qa_deepspeed.qa.metrics.by_file import flat_metrics
from qa_deepspeed.qa.metrics.prediction_files import read_gold, read_null_odds, read_predictions
from qa_deepspeed.qa.metrics.squad import score
from qa_deepspeed.runs.evaluation_folder import refuse_foreign_answers, write_evaluation_record
from qa_deepspeed.training.evaluation.evaluate import EvaluationData, describe, describe_files, evaluate
from qa_deepspeed.training.evaluation.scoring import evaluation_options
from qa_deepspeed.training.features import load_features, require_gold
from qa_deepspeed.utils.errors import UserError


class PlainReader:
    """A model in this process, without DeepSpeed."""

    device = torch.device("cpu")

    def __init__(self, module):
        self.module = module.eval()
        self.evaluating = contextlib.nullcontext

    def eval_forward(self, inputs):
        with torch.inference_mode():
            return self.module(**inputs)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, 3, 4, 4)
    return folder


@pytest.fixture(scope="module")
def setup(sample):
    """(reader, data, options) of an untrained model, whose logits are far apart, on questions of several windows."""
    options = RunOptions(
        model_name_or_path=str(sample / "model"),
        predict_file=str(sample / "dev.json"),
        cache_dir=str(sample / "cache"),
        version_2_with_negative=True,
        max_seq_length=36,
        max_query_length=16,
        doc_stride=8,
        n_best_size=7,
    )
    facts = model_facts(options)
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_config(AutoConfig.from_pretrained(sample / "model"))
    model.qa_outputs.weight.data.mul_(8)
    layout = facts.layout(model_columns(model, facts.config), 0)
    data = EvaluationData(load_features(options, "evaluate", facts), layout, facts.tokenizer)
    assert len(data.store) > 2 * len(data.store.examples) and len(data.store.examples) > 20
    return PlainReader(model), data, options


def run(setup, folder: Path, **changes):
    reader, data, options = setup
    options = evaluation_options(replace(options, **changes, given=frozenset(changes)))
    folder.mkdir(exist_ok=True)
    return evaluate(reader, data, options, folder).metrics


def saved_logits(folder: Path):
    with np.load(folder / "logits.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_full_logits_equal_the_models_and_give_the_same_answers(setup, tmp_path):
    run(setup, tmp_path / "few")
    run(setup, tmp_path / "full", gather="full")
    for name in ("predictions.json", "nbest_predictions.json", "null_odds.json", "metrics.json"):
        assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "full" / name).read_bytes()
    assert not (tmp_path / "few" / "logits.npz").exists()
    logits = saved_logits(tmp_path / "full")
    reader, data, _ = setup
    assert logits["example_id"].tolist() == [data.store.examples.ids[i] for i in data.store.example_index]
    rows = data.store.take(np.arange(len(data.store)))
    for row in range(0, len(data.store), 9):
        ids = rows.input_ids[rows.row_splits[row] : rows.row_splits[row + 1]]
        types = rows.token_type_ids[rows.row_splits[row] : rows.row_splits[row + 1]]
        alone = reader.eval_forward(
            {"input_ids": torch.tensor(ids[None]).long(), "token_type_ids": torch.tensor(types[None]).long()}
        )
        np.testing.assert_allclose(logits["start_logits"][row, : len(ids)], alone.start_logits[0], atol=1e-4)
        np.testing.assert_allclose(logits["end_logits"][row, : len(ids)], alone.end_logits[0], atol=1e-4)
        assert np.isneginf(logits["start_logits"][row, len(ids) :]).all()


def best_by_brute_force(setup, logits, best_window_only):
    """The best text of each question: every pair of every window, the max-context rule token by token."""
    _, data, options = setup
    store, best = data.store, {}
    rows = store.take(np.arange(len(store)))
    begins, lengths = store.windows(np.arange(len(store)))

    def context(row, token):  # the smaller side, by the rule of run_squad.py
        left, right = token - begins[row], begins[row] + lengths[row] - 1 - token
        return min(left, right) + 0.01 * lengths[row] if left >= 0 and right >= 0 else -np.inf

    for row, example in enumerate(store.example_index):
        mates = np.flatnonzero(store.example_index == example)
        first, stop = int(rows.context_begin[row]), int(rows.context_end[row])
        for start in range(first, stop):
            token = begins[row] + start - first
            if best_window_only and row != max(mates, key=lambda mate: (context(mate, token), -mate)):  # noqa: B023
                continue
            for end in range(start, min(stop, start + options.max_answer_length)):
                score = logits["start_logits"][row, start] + logits["end_logits"][row, end]
                place = store.character_spans(np.array([row]), np.array([start]), np.array([end]))
                found = (score, -place[0][0], -place[1][0])
                best[example] = max(best.get(example, (-np.inf,)), found)
    texts = {}
    for index, example in enumerate(store.examples):
        _, begin, end = best[index]
        texts[example.example_id] = example.context[-begin:-end].strip()
    return texts


def test_number_of_threads_changes_only_last_digits(setup, tmp_path):
    """Matrix products may sum in another order: scores agree within 1e-4, and answers except for such ties."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            run(setup, tmp_path / str(threads))
    finally:
        torch.set_num_threads(before)
    one, three = (json.loads((tmp_path / name / "nbest_predictions.json").read_text()) for name in ("1", "3"))
    assert one.keys() == three.keys()
    for example_id, entries in one.items():
        scores = {(e["text"], e["start"]): e["start_logit"] + e["end_logit"] for e in three[example_id]}
        for rank, entry in enumerate(entries):
            score, other = entry["start_logit"] + entry["end_logit"], three[example_id][rank]
            assert other["start_logit"] + other["end_logit"] == pytest.approx(score, abs=1e-4)
            place = entry["text"], entry["start"]
            # the last entry of a list may swap with the first one outside it
            assert rank == len(entries) - 1 or scores[place] == pytest.approx(score, abs=1e-4)


def test_best_window_only_restricts_starts(setup, tmp_path):
    run(setup, tmp_path / "all", gather="full", null_score_diff_threshold=1e9)
    run(setup, tmp_path / "best", best_window_only=True, null_score_diff_threshold=1e9)
    logits = saved_logits(tmp_path / "all")
    everywhere, best = (read_predictions(str(tmp_path / name / "predictions.json")) for name in ("all", "best"))
    assert everywhere == best_by_brute_force(setup, logits, False)
    assert best == best_by_brute_force(setup, logits, True)
    assert everywhere != best


def test_loss_is_the_mean_over_all_windows(setup, tmp_path):
    """Against every window alone, by torch's cross-entropy over the positions that an answer can have."""
    metrics = run(setup, tmp_path / "loss", metric_for_best_model="loss", per_gpu_eval_batch_size=5)
    reader, data, _ = setup
    losses = []
    for row in range(len(data.store)):
        batch = make_batch(data.store.take, np.array([row]), data.layout)
        outputs = reader.eval_forward(batch.inputs)
        begin, end = int(batch.context_begin[0]), int(batch.context_end[0])
        places = [int(batch.null_position[0]), *range(begin, end)]
        for logits, label in ((outputs.start_logits, batch.start), (outputs.end_logits, batch.end)):
            target = torch.tensor(places.index(int(label[0])))
            losses.append(float(torch.nn.functional.cross_entropy(logits[0, places], target)))
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert json.loads((tmp_path / "loss/metrics.json").read_text())["loss"] == metrics["loss"]
    assert run(setup, tmp_path / "without")["loss"] == pytest.approx(metrics["loss"], rel=1e-5)


def test_decode_modes_equal_their_functions(setup, tmp_path):
    _, data, options = setup
    run(setup, tmp_path / "hf", decode_mode="hf")
    run(setup, tmp_path / "classic", decode_mode="classic")
    logits = FullLogits(*(saved_logits(tmp_path / "hf")[name] for name in ("feature_id", "start_logits", "end_logits")))
    settings = DecodeSettings(n_best_size=7, version_2_with_negative=True)
    hf = {p.example_id: p.text for p in decode_like_transformers(logits, data.store, settings)}
    how = classic_text(AutoTokenizer.from_pretrained(options.model_name_or_path))
    assert how.do_lower_case
    classic = {p.example_id: p.text for p in decode_classic(logits, data.store, settings, how)}
    assert read_predictions(str(tmp_path / "hf" / "predictions.json")) == hf
    assert read_predictions(str(tmp_path / "classic" / "predictions.json")) == classic
    assert hf != classic


def test_merge_duplicate_texts(setup, tmp_path):
    """With lists long enough to contain words that occur twice."""
    run(setup, tmp_path / "plain", n_best_size=300)
    run(setup, tmp_path / "merged", n_best_size=300, merge_duplicate_texts=True)

    def repeated(folder):
        lists = json.loads((tmp_path / folder / "nbest_predictions.json").read_text()).values()
        return sum(len(entries) - len({entry["text"] for entry in entries}) for entries in lists)

    assert repeated("plain") > 0 and repeated("merged") == 0


def test_auto_threshold_is_tuned_applied_and_saved(setup, tmp_path):
    _, _, options = setup
    (tmp_path / "auto").mkdir()
    (tmp_path / "auto" / "config.json").write_text('{"model_type": "bert"}')
    metrics = run(setup, tmp_path / "auto", null_score_diff_threshold="auto")
    plain = run(setup, tmp_path / "plain")
    threshold = metrics["null_score_diff_threshold"]
    assert threshold == metrics["tuned_f1_thresh"] != 0
    assert json.loads((tmp_path / "auto" / "config.json").read_text()) == {
        "model_type": "bert",
        "null_score_diff_threshold": threshold,
    }
    assert (metrics["untuned_exact"], metrics["untuned_f1"]) == (plain["exact"], plain["f1"])
    assert metrics["f1"] == pytest.approx(metrics["tuned_f1"])
    assert metrics["tuned_f1"] > max(plain["f1"], metrics["crossfit_f1"])
    answers = read_predictions(str(tmp_path / "auto" / "predictions.json"))
    odds = read_null_odds(str(tmp_path / "auto" / "null_odds.json"))
    assert all((text == "") == (odds[k] > threshold) for k, text in answers.items())
    assert any(text == "" for text in answers.values())
    again = score(read_gold(options.predict_file).questions, answers, odds)
    assert again["f1"] == pytest.approx(metrics["f1"]) and again["exact"] == pytest.approx(metrics["exact"])
    assert again["crossfit_f1"] != pytest.approx(metrics["crossfit_f1"]), "answers that were left out are not known"


@pytest.mark.parametrize("threshold", ["auto", "median"])
def test_score_gives_every_number_of_the_evaluation(setup, tmp_path, capsys, threshold):
    """crossfit_* and tuned_* too: the n-best lists beside the predictions have the answers that were left out."""
    metrics = run(setup, tmp_path, null_score_diff_threshold="auto" if threshold == "auto" else 0.0)
    if threshold == "median":
        odds = list(read_null_odds(str(tmp_path / "null_odds.json")).values())
        metrics = run(setup, tmp_path, null_score_diff_threshold=float(np.median(odds)))
    named = [setup[2].predict_file, str(tmp_path / "predictions.json"), "--null_odds", str(tmp_path / "null_odds.json")]
    with pytest.raises(SystemExit):
        main(["score", *named, "--null_odds_threshold", "none", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert metrics["crossfit_f1"] > 0
    for name, value in metrics.items():
        if name not in ("loss", "null_score_diff_threshold", "untuned_exact", "untuned_f1"):
            assert found[name] == pytest.approx(value), name
    (tmp_path / "nbest_predictions.json").unlink()
    with pytest.raises(SystemExit):
        main(["score", *named, "--json"])
    assert "tuned_* and crossfit_* count empty predictions as they are" in capsys.readouterr().err


def test_several_files_have_scores_of_their_own(setup, sample, tmp_path):
    """Those of each alone, at one threshold; two files of one base name, with an id that both have."""
    reader, _, options = setup
    document = json.loads((sample / "dev.json").read_text())
    paths = [tmp_path / name / "dev.json" for name in ("one", "two")]
    ids = [question["id"] for paragraph in document["data"][0]["paragraphs"] for question in paragraph["qas"]]
    other = document["data"][-1]["paragraphs"][0]["qas"][0]
    answer = [other["id"], *ids[1:]]
    other["id"] = ids[0]
    for path, articles in zip(paths, (document["data"][:1], document["data"][1:]), strict=True):
        path.parent.mkdir()
        path.write_text(json.dumps({"version": "v2.0", "data": articles}))

    def evaluated(predict_file, folder):
        given = replace(options, predict_file=predict_file, null_score_diff_threshold=-1.0)
        facts = model_facts(given)
        data = EvaluationData(load_features(given, "evaluate", facts), setup[1].layout, facts.tokenizer)
        folder.mkdir()
        return evaluate(reader, data, given, folder)

    alone = [evaluated(str(path), tmp_path / f"out{number}").metrics for number, path in enumerate(paths)]
    assert all("files" not in metrics and "macro_f1" not in metrics for metrics in alone)
    both = evaluated(",".join(map(str, paths)), tmp_path / "both")
    metrics = both.metrics
    assert list(metrics["files"]) == ["one/dev.json", "two/dev.json"]
    for name, ours in zip(metrics["files"], alone, strict=True):
        found = metrics["files"][name]
        shared = ours.keys() - {"null_score_diff_threshold"} - {key for key in ours if key.startswith("crossfit")}
        assert found == {key: pytest.approx(ours[key]) for key in shared} | {
            key: found[key]
            for key in found
            if key.startswith("crossfit")  # halves by id, one of which is another
        }
    totals = [one["total"] for one in alone]
    assert metrics["total"] == sum(totals)
    assert metrics["f1"] == pytest.approx(np.average([one["f1"] for one in alone], weights=totals))
    assert metrics["macro_f1"] == pytest.approx(np.mean([one["f1"] for one in alone]))
    assert metrics["macro_f1"] != pytest.approx(metrics["f1"])
    assert json.loads((tmp_path / "both/metrics.json").read_text()) == metrics == both.result.metrics
    answers = read_predictions(str(tmp_path / "both/predictions.json"))
    assert len(answers) == sum(totals) and {ids[0], f"2/{ids[0]}"} <= answers.keys() and answer[0] not in answers
    assert both.result.questions.files == ["one/dev.json", "two/dev.json"]
    assert "Evaluation on 2 files" in (tmp_path / "both/report.html").read_text()
    assert [line.split(":")[0] for line in describe_files(metrics)] == ["  one/dev.json", "  two/dev.json"]
    assert f"mean F1 of the files {metrics['macro_f1']:.2f}" in describe(metrics)
    assert flat_metrics(metrics)["two/dev.json/f1"] == metrics["files"]["two/dev.json"]["f1"]


def test_the_line_of_an_evaluation_has_the_scores_that_people_look_for():
    metrics = {"exact": 70.0, "f1": 75.5, "total": 1200, "best_f1": 80.0, "crossfit_f1": 79.0}
    assert describe(metrics) == "EM 70.00  F1 75.50  questions 1,200"
    v2 = {**metrics, "HasAns_f1": 60.0, "NoAns_f1": 90.0, "null_score_diff_threshold": -2.67, "not_scored": 3}
    assert describe(v2) == (
        "EM 70.00  F1 75.50  answerable F1 60.00  unanswerable F1 90.00  threshold -2.670  questions 1,200  "
        "not scored for want of gold answers: 3"
    )
    assert describe_files(metrics) == []
    many = {**metrics, "files": {f"{number}.json": {"total": 0} for number in range(23)}}
    assert describe_files(many)[-1] == "  ... and 3 files more in metrics.json" and len(describe_files(many)) == 21


def test_slices_of_the_report_average_to_the_metrics(setup, tmp_path):
    metrics = run(setup, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["metrics"] == metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    for values in (report["slices"][name].values() for name in ("question_word", "windows", "answerable")):
        assert sum(cell["questions"] for cell in values) == metrics["total"]
        assert sum(cell["questions"] * cell["f1"] for cell in values) / metrics["total"] == pytest.approx(metrics["f1"])
    windows = np.bincount(setup[1].store.example_index)
    assert {name: cell["questions"] for name, cell in report["slices"]["windows"].items() if name != "4+"} == {
        str(number): int((windows == number).sum()) for number in (1, 2, 3) if (windows == number).any()
    }
    assert report["intervals"]["f1"][0] <= metrics["f1"] <= report["intervals"]["f1"][1]
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()


def test_result_equals_the_files(setup, tmp_path):
    reader, data, options = setup
    evaluation = evaluate(reader, data, options, tmp_path)
    result = evaluation.result
    assert evaluation.metrics == result.metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert json.loads(json.dumps(result.report)) == json.loads((tmp_path / "report.json").read_text())
    answers = read_predictions(str(tmp_path / "predictions.json"))
    nbest = json.loads((tmp_path / "nbest_predictions.json").read_text())
    confidence = [next(e["probability"] for e in nbest[k] if e["text"] == answers[k]) for k in data.store.examples.ids]
    np.testing.assert_array_equal(result.confidence, np.array(confidence, np.float32))
    assert result.null_odds.tolist() == [
        read_null_odds(str(tmp_path / "null_odds.json"))[k] for k in data.store.examples.ids
    ]
    assert 100 * result.correct.mean() == pytest.approx(evaluation.metrics["exact"])


def test_metric_language(setup, tmp_path):
    assert run(setup, tmp_path / "zh", metric_language="zh")["f1"] != run(setup, tmp_path / "en")["f1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode_mode": "hf", "gather": "candidates"}, "needs --gather full"),
        ({"decode_mode": "classic", "merge_duplicate_texts": True}, "leave --merge_duplicate_texts out"),
        ({"null_score_diff_threshold": "auto", "version_2_with_negative": False}, "--version_2_with_negative"),
    ],
)
def test_contradicting_options_are_a_one_line_error(changes, message):
    with pytest.raises(UserError, match=message):
        evaluation_options(RunOptions(**{"version_2_with_negative": True, **changes}, given=frozenset(changes)))


# ---- questions without gold answers ----


def without_gold(sample, folder: Path, every: int) -> tuple[Path, list[str]]:
    """dev.json with no answers in every n-th question, and the ids of the others."""
    document, kept, number = json.loads((sample / "dev.json").read_text()), [], 0
    for article in document["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                number += 1
                if number % every == 0:
                    del question["answers"], question["is_impossible"]
                else:
                    kept.append(question["id"])
    path = folder / "partly.json"
    path.write_text(json.dumps(document))
    return path, kept


@pytest.mark.parametrize("metric", ["f1", "loss"])
def test_questions_without_gold_are_answered_and_not_scored(setup, sample, tmp_path, metric):
    """Scores are those of a file without these questions; the answers are those of the whole file."""
    reader, data, options = setup
    path, kept = without_gold(sample, tmp_path, 3)
    partly = replace(options, predict_file=str(path))
    store = load_features(partly, "evaluate", model_facts(partly))
    found = run((reader, replace(data, store=store), partly), tmp_path / "partly", metric_for_best_model=metric)
    run(setup, tmp_path / "all")
    answers = (tmp_path / "partly/predictions.json").read_bytes()
    assert answers == (tmp_path / "all/predictions.json").read_bytes()

    document = json.loads(path.read_text())
    for article in document["data"]:
        for paragraph in article["paragraphs"]:
            paragraph["qas"] = [one for one in paragraph["qas"] if one["id"] in kept]
    (tmp_path / "rest.json").write_text(json.dumps(document))
    rest = replace(options, predict_file=str(tmp_path / "rest.json"))
    of_rest = replace(data, store=load_features(rest, "evaluate", model_facts(rest)))
    expected = run((reader, of_rest, rest), tmp_path / "rest", metric_for_best_model=metric)
    assert found.pop("not_scored") == store.without_gold == len(store.examples) - len(kept) > 5
    assert found == pytest.approx(expected, abs=1e-5) and found["total"] == len(kept)
    reports = [json.loads((tmp_path / one / "report.json").read_text()) for one in ("partly", "rest")]
    assert reports[0]["slices"] == reports[1]["slices"] and reports[0]["questions"] == len(kept)


def test_without_any_gold_answers_are_written_and_nothing_is_scored(setup, sample, tmp_path):
    reader, data, options = setup
    path, _ = without_gold(sample, tmp_path, 1)
    options = replace(options, predict_file=str(path))
    store = load_features(options, "evaluate", model_facts(options))
    found = run((reader, replace(data, store=store), options), tmp_path / "none")
    run(setup, tmp_path / "all")
    names = ("predictions.json", "nbest_predictions.json", "null_odds.json")
    for name in names:
        assert (tmp_path / "none" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
    assert found.items() >= {"total": 0, "not_scored": len(store.examples)}.items() and "f1" not in found
    assert {file.name for file in (tmp_path / "none").iterdir()} == {*names, "metrics.json"}
    require_gold(store, options)
    for change, name in (
        ({"metric_for_best_model": "f1"}, "metric_for_best_model f1"),
        ({"null_score_diff_threshold": "auto"}, "null_score_diff_threshold auto"),
    ):
        with pytest.raises(UserError, match=f"{name} needs scores.*partly.json.*looked for 'answers'"):
            require_gold(store, replace(options, **change))


# ---- whose answers lie in the output folder ----


def test_answers_of_another_model_or_program_are_not_overwritten(setup, tmp_path):
    _, _, options = setup
    refuse_foreign_answers(tmp_path, options)
    write_evaluation_record(tmp_path, options)
    (tmp_path / "predictions.json").write_text("{}")
    refuse_foreign_answers(tmp_path, options)
    other = replace(options, model_name_or_path=str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="predictions.json of another model .*--overwrite_output_dir"):
        refuse_foreign_answers(tmp_path, other)
    refuse_foreign_answers(tmp_path, replace(other, overwrite_output_dir=True))
    for damaged in ("", "[]", '{"model": 7}'):
        (tmp_path / "evaluation.json").write_text(damaged)
        with pytest.raises(UserError, match="no record says whose"):
            refuse_foreign_answers(tmp_path, options)
    refuse_foreign_answers(tmp_path, replace(options, model_name_or_path=str(tmp_path)))
