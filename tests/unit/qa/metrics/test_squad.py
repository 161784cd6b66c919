"""The metrics against a plain reimplementation of the official SQuAD rules, on real and on generated gold files."""

import collections
import json
import random
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_deepspeed.cli.data.sample import make_corpora
from qa_deepspeed.qa.decoding.predictions import Prediction
from qa_deepspeed.qa.metrics.normalization import METRIC_LANGUAGES, normalized_tokens
from qa_deepspeed.qa.metrics.prediction_files import read_gold
from qa_deepspeed.qa.metrics.squad import Gold, Scorer, score
from qa_deepspeed.utils.errors import UserError
from tests.paths import DATA, needs_real_data


def normalized(text):
    without_punctuation = ""
    for character in text.lower():
        if character not in string.punctuation:
            without_punctuation += character
    for article in ("a", "an", "the"):
        without_punctuation = re.sub(r"\b" + article + r"\b", " ", without_punctuation)
    return " ".join(without_punctuation.split())


def f1(gold, predicted, empty):
    gold, predicted = normalized(gold).split(), normalized(predicted).split()
    if not gold or not predicted:
        return empty(gold == predicted)
    same = 0
    for word in set(gold):
        same += min(gold.count(word), predicted.count(word))
    if same == 0:
        return 0
    precision, recall = same / len(predicted), same / len(gold)
    return 2 * precision * recall / (precision + recall)


def version_1(golds, predictions):
    exact = total_f1 = 0
    for example_id, texts in golds:
        if example_id in predictions:
            answer = predictions[example_id]
            exact += max(normalized(text) == normalized(answer) for text in texts)
            total_f1 += max(f1(text, answer, lambda both: 0) for text in texts)
    return {"exact": 100.0 * exact / len(golds), "f1": 100.0 * total_f1 / len(golds), "total": len(golds)}


def version_2(golds, predictions, odds=None, threshold=None):
    exact, partial = {}, {}
    for example_id, texts in golds:
        texts = [text for text in texts if normalized(text)] or [""]
        if example_id in predictions:
            answer = predictions[example_id]
            exact[example_id] = max(int(normalized(text) == normalized(answer)) for text in texts)
            partial[example_id] = max(f1(text, answer, int) for text in texts)
    answerable = {example_id: bool(texts) for example_id, texts in golds}
    result = {}
    if odds is not None:
        for name, scores in (("exact", exact), ("f1", partial)):
            now = best = sum(not has for has in answerable.values())
            where = 0.0
            for example_id in sorted(odds, key=lambda k: odds[k]):
                if example_id in scores:
                    if answerable[example_id]:
                        now += scores[example_id]
                    elif predictions[example_id]:
                        now -= 1
                    if now > best:
                        best, where = now, odds[example_id]
            result[f"best_{name}"], result[f"best_{name}_thresh"] = 100.0 * best / len(scores), where
    if threshold is not None:
        for scores in (exact, partial):
            for example_id in scores:
                if odds[example_id] > threshold:
                    scores[example_id] = float(not answerable[example_id])
    for prefix, wanted in (("", (True, False)), ("HasAns_", (True,)), ("NoAns_", (False,))):
        ids = [example_id for example_id in exact if answerable[example_id] in wanted]
        if ids:
            result[prefix + "exact"] = 100.0 * sum(exact[k] for k in ids) / len(ids)
            result[prefix + "f1"] = 100.0 * sum(partial[k] for k in ids) / len(ids)
            result[prefix + "total"] = len(ids)
    return result


def official_keys(metrics):
    return {
        k: v for k, v in metrics.items() if not k.startswith(("tuned_", "crossfit_")) and k not in ("missing", "extra")
    }


def corrupted(text, generator):
    ways = (
        str.upper,
        str.title,
        lambda t: f"  The {t}",
        lambda t: f"«{t}»",
        lambda t: f"({t}.)",
        lambda t: t.replace(" ", "\u00a0"),
        lambda t: t.replace(" ", " \t\n "),
        lambda t: t.replace("-", "\u2013"),
        lambda t: t + " an",
        lambda t: t[: len(t) // 2],
        lambda t: " ".join(reversed(t.split())),
        lambda t: t + " " + t,
        lambda t: t.replace("i", "\u0130"),
        lambda t: t.encode("utf-8").decode("latin-1"),
        lambda t: t.replace("e", "e\u0301"),
        lambda t: "",
        lambda t: " ",
        lambda t: "the",
        lambda t: ".",
        lambda t: "\U0001f600",
    )
    return generator.choice(ways)(text)


def prediction_sets(questions):
    """Named prediction dicts for a gold file: perfect, empty, corrupted, incomplete, with extra ids."""
    generator = random.Random(7)
    first = {gold.example_id: gold.texts[0] if gold.texts else "" for gold in questions}
    other = list(first.values())
    answer_all = {k: text or generator.choice(other) for k, text in first.items()}
    some = dict(list(first.items())[::3])
    yield "perfect", first
    yield "empty", dict.fromkeys(first, "")
    yield "corrupted", {k: corrupted(text, generator) for k, text in answer_all.items()}
    yield "shuffled", dict(zip(first, generator.sample(other, len(other)), strict=True))
    yield "missing", some
    yield "extra", {"no such question": "x", **first, "nor this": ""}


def made_gold(folder, version_2):
    """The path of a gold file: the questions of a made corpus, for v1.1 the answerable ones only."""
    document = make_corpora(5, 1, 12)[1]
    if not version_2:
        document["version"] = "1.1"
        for article in document["data"]:
            for paragraph in article["paragraphs"]:
                answerable = [asked for asked in paragraph["qas"] if asked["answers"]]
                paragraph["qas"] = [{k: v for k, v in asked.items() if k != "is_impossible"} for asked in answerable]
    path = folder / "gold.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_version_1_on_made_gold(tmp_path):
    assert_version_1(read_gold(str(made_gold(tmp_path, False))))


@needs_real_data
@pytest.mark.parametrize("name", ["en-v1-dev.json", "ja-v1-sample.json"])
def test_version_1_on_real_gold(name):
    assert_version_1(read_gold(str(DATA / name)))


def assert_version_1(gold):
    assert not gold.version_2
    for case, predictions in prediction_sets(gold.questions):
        metrics = score(gold.questions, predictions, version_2_with_negative=False)
        assert official_keys(metrics) == version_1(gold.questions, predictions), case
        ids = {q.example_id for q in gold.questions}
        assert metrics["missing"] == len(ids - predictions.keys()) and metrics["extra"] == len(predictions.keys() - ids)


def test_version_2_on_made_gold(tmp_path):
    assert_version_2(read_gold(str(made_gold(tmp_path, True))))


@needs_real_data
def test_version_2_on_real_gold():
    assert_version_2(read_gold(str(DATA / "en-v2-dev.json")))


def assert_version_2(gold):
    assert gold.version_2
    generator = random.Random(11)
    for case, predictions in prediction_sets(gold.questions):
        assert official_keys(score(gold.questions, predictions, version_2_with_negative=True)) == version_2(
            gold.questions, predictions
        ), case
        for distinct in (3, 10**9):
            odds = {
                k: generator.randrange(distinct) / distinct * 4 - 2
                for k in generator.sample(list(predictions), len(predictions))
            }
            for threshold in (None, 1.0, -0.5):
                metrics = score(gold.questions, predictions, odds, threshold)
                assert official_keys(metrics) == version_2(gold.questions, predictions, odds, threshold), case


texts = st.text(alphabet="aAtThe. \u00e9\u0130,-", max_size=8)
gold_lists = st.lists(st.lists(texts, max_size=3), min_size=1, max_size=8)


@st.composite
def scored_sets(draw):
    golds = [Gold(f"q{i}", tuple(one)) for i, one in enumerate(draw(gold_lists))]
    ids = draw(st.permutations([gold.example_id for gold in golds]))
    answered = ids[: draw(st.integers(1, len(ids)))]
    predictions = {k: draw(texts | st.sampled_from([t for g in golds for t in g.texts] or [""])) for k in answered}
    odds = {k: draw(st.sampled_from([-1.0, 0.0, 0.5, 2.0]) | st.floats(-5, 5)) for k in draw(st.permutations(answered))}
    return golds, predictions, odds


@settings(max_examples=500, deadline=None)
@given(scored_sets(), st.none() | st.floats(-5, 5))
def test_version_2_on_generated_gold(case, threshold):
    golds, predictions, odds = case
    assert official_keys(score(golds, predictions, odds, threshold)) == version_2(golds, predictions, odds, threshold)


@settings(max_examples=200, deadline=None)
@given(scored_sets())
def test_version_1_on_generated_gold(case):
    golds, predictions, _ = case
    golds = [gold if gold.texts else Gold(gold.example_id, ("x",)) for gold in golds]
    assert official_keys(score(golds, predictions, version_2_with_negative=False)) == version_1(golds, predictions)


@settings(max_examples=300, deadline=None)
@given(scored_sets())
def test_tuned_threshold_is_optimal(case):
    golds, predictions, odds = case
    golds = [gold for gold in golds if gold.example_id in predictions]
    metrics = score(golds, predictions, odds, version_2_with_negative=True)
    for name in ("exact", "f1"):
        best = max(version_2(golds, predictions, odds, t)[name] for t in [*odds.values(), min(odds.values()) - 1])
        assert metrics[f"tuned_{name}"] == pytest.approx(best, abs=1e-9)
        at = score(golds, predictions, odds, metrics[f"tuned_{name}_thresh"], version_2_with_negative=True)
        assert at[name] == pytest.approx(best, abs=1e-9)


def test_tuning_scores_the_best_spans_not_the_answers_given():
    scorer = Scorer(version_2_with_negative=True)
    for example_id, gold, odds in (("a", ("yes",), 2.0), ("b", (), 3.0)):
        scorer.add(Gold(example_id, gold), "", odds, best_span_text="yes")
    metrics = scorer.result()
    assert (metrics["exact"], metrics["best_exact"], metrics["best_exact_thresh"]) == (50.0, 50.0, 0.0)
    assert (metrics["tuned_exact"], metrics["tuned_exact_thresh"]) == (100.0, 2.0)


def test_tuning_treats_equal_odds_alike():
    golds = [Gold("a", ("yes",)), Gold("b", ())]
    metrics = score(golds, {"a": "yes", "b": "yes"}, {"a": 1.0, "b": 1.0})
    assert (metrics["best_exact"], metrics["tuned_exact"]) == (100.0, 50.0)


def test_cross_fitting_uses_the_other_halfs_threshold():
    generator = random.Random(1)
    golds, predictions, odds = [], {}, {}
    for i in range(400):  # uninformative odds: any gain from tuning is overfitting
        golds.append(Gold(f"q{i}", ("yes",) if generator.random() < 0.5 else ()))
        predictions[f"q{i}"], odds[f"q{i}"] = "yes", generator.random()
    metrics = score(golds, predictions, odds)
    assert metrics["crossfit_exact"] < metrics["tuned_exact"]
    assert metrics["tuned_exact"] > 50
    by_answerable = score(golds, predictions, {g.example_id: float(not g.texts) for g in golds})
    assert by_answerable["crossfit_exact"] == by_answerable["tuned_exact"] == 100.0


def test_streaming_equals_scoring_at_once():
    golds = [Gold("a", ("yes",)), Gold("b", ()), Gold("c", ("no way",))]
    predictions = [
        Prediction(gold.example_id, text, [(text, 1.0, 0.0, 0.0, 0)], odds)
        for gold, text, odds in zip(golds, ("yes", "no", "way"), (-2.0, 1.0, 0.5), strict=True)
    ]
    scorer = Scorer(version_2_with_negative=True)
    for gold, prediction in zip(golds, predictions, strict=True):
        scorer.add(gold, prediction.text, prediction.null_odds, prediction.best_span_text)
    at_once = score(
        golds, {p.example_id: p.text for p in predictions}, {p.example_id: p.null_odds for p in predictions}
    )
    assert at_once.pop("missing") == at_once.pop("extra") == 0
    assert scorer.result() == at_once


def test_v1_question_without_gold_text_scores_0():
    metrics = score([Gold("a", ()), Gold("b", ("x",))], {"a": "", "b": "x"}, version_2_with_negative=False)
    assert (metrics["exact"], metrics["f1"], metrics["total"]) == (50.0, 50.0, 2)


def test_repeated_id():
    golds = [Gold("a", ("x",)), Gold("a", ("y",))]
    assert score(golds, {"a": "y"}, version_2_with_negative=False)["exact"] == 50.0
    assert score(golds, {"a": "y"}, version_2_with_negative=True)["total"] == 1


def test_unscorable_input_is_a_one_line_error():
    with pytest.raises(UserError, match="no questions"):
        score([], {})
    with pytest.raises(UserError, match="none of the 1 gold questions has a prediction"):
        score([Gold("a", ())], {"b": ""}, version_2_with_negative=True)
    with pytest.raises(UserError, match=r"null odds lack 1 questions .*first: b"):
        score([Gold("a", ()), Gold("b", ())], {"a": "", "b": ""}, {"a": 1.0})


@pytest.mark.parametrize(
    ("language", "text", "tokens"),
    [
        ("en", "The  Cat's «hat»", ["cats", "«hat»"]),
        ("zh", "北京 2008年，the Olympic《奥运》", ["北", "京", "2008", "年", "the", "olympic", "奥", "运"]),
        ("ja", "東京ﾀﾜｰは、333メートル。", [*"東京ﾀﾜｰは", "333", *"メートル"]),
        ("th", "กรุงเทพ 10", ["ก", "รุ", "ง", "เ", "ท", "พ", "10"]),
        ("de", "Der „Rhein“, ein Fluss", ["rhein", "fluss"]),
        ("es", "La casa — un árbol", ["casa", "árbol"]),
        ("hi", "ताज महल।", ["ताज", "महल"]),
        ("vi", "những ngôi nhà", ["ngôi", "nhà"]),
        ("ar", "القاهرة", ["قاهرة"]),
    ],
)
def test_languages(language, text, tokens):
    assert normalized_tokens(text, language) == tokens


def test_all_languages_are_covered():
    marks = test_languages.pytestmark[0].args[1]
    assert {case[0] for case in marks} == set(METRIC_LANGUAGES)


def assert_characters_count(golds):
    cut = {gold.example_id: gold.texts[0][:-1] for gold in golds}
    assert score(golds, cut, version_2_with_negative=False)["f1"] < 5
    assert score(golds, cut, version_2_with_negative=False, language="ja")["f1"] > 70
    perfect = {gold.example_id: gold.texts[0] for gold in golds}
    assert score(golds, perfect, version_2_with_negative=False, language="ja")["exact"] == 100


def test_characters_count_in_languages_without_spaces():
    golds = [Gold("a", ("日本の首都",)), Gold("b", ("京都タワー", "タワー")), Gold("c", ("富士山の頂上",))]
    assert_characters_count(golds)
    # four of five characters: precision 1, recall 4/5; of the second question's two gold texts the better counts
    cut = {"a": "日本の首", "b": "タワ", "c": ""}
    expected = 100 * (2 * 4 / 9 + 2 * 2 / 5) / 3
    assert score(golds, cut, version_2_with_negative=False, language="ja")["f1"] == pytest.approx(expected)


@needs_real_data
def test_characters_count_on_a_real_file():
    assert_characters_count(read_gold(str(DATA / "ja-v1-sample.json")).questions)


def assert_read_completely(path):
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    expected = collections.OrderedDict(
        (qa["id"], tuple(answer["text"] for answer in qa["answers"]))
        for article in articles
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    )
    assert [tuple(gold) for gold in read_gold(str(path)).questions] == list(expected.items())


@pytest.mark.parametrize("version_2", [False, True])
def test_made_gold_files_are_read_completely(tmp_path, version_2):
    assert_read_completely(made_gold(tmp_path, version_2))


@needs_real_data
@pytest.mark.parametrize("name", ["en-v1-dev.json", "en-v2-dev.json", "ja-v1-sample.json"])
def test_real_gold_files_are_read_completely(name):
    assert_read_completely(DATA / name)
