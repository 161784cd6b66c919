"""`decode_classic` against Transformers 4 itself, in a virtual environment of its own, and on small cases by hand.

python -m venv /somewhere && /somewhere/bin/pip install transformers==4.57.6
QA_DEEPSPEED_TRANSFORMERS_4=/somewhere/bin/python pytest tests/unit/qa/decoding/test_classic.py
"""

import json
import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest

from qa_deepspeed.qa.decoding.classic import ClassicText, basic_tokens, decode_classic, final_text, wordpiece_joiner
from qa_deepspeed.qa.decoding.full_logits import FullLogits
from qa_deepspeed.qa.decoding.predictions import DecodeSettings
from tests.paths import DATA, MINILM, REPOSITORY, needs_real_data, needs_real_model

TRANSFORMERS_4 = os.environ.get("QA_DEEPSPEED_TRANSFORMERS_4", "")
needs_transformers_4 = pytest.mark.skipif(
    not TRANSFORMERS_4,
    reason="set QA_DEEPSPEED_TRANSFORMERS_4 to the python of an environment with transformers 4.57.6",
)
LENGTH, STEP, QUERY = 160, 50, 24


@pytest.mark.parametrize(
    ("text", "lower", "tokens"),
    [
        ("Zürich's, naïve", True, ["zurich", "'", "s", ",", "naive"]),
        ("Zürich's", False, ["Zürich", "'", "s"]),
        ("a\u00a0b\u200bc\ufffdd\x00", True, ["a", "bcd"]),
        ("中文abc", True, ["中", "文", "abc"]),
        ("$5–6", True, ["$", "5", "–", "6"]),
    ],
)
def test_basic_tokens(text, lower, tokens):
    assert basic_tokens(text, lower) == tokens


def test_final_text():
    assert final_text("steve smith", "Steve Smith's", True) == "Steve Smith"
    assert final_text("smith", "Steve Smith's", True) == "Smith"
    assert final_text("jones", "Steve Smith's", True) == "Steve Smith's"  # not found: the whole text
    assert final_text("zurich", "(Zürich)", True) == "Zürich"
    assert final_text("5", "½5", False) == "5"
    assert final_text("x", "a\u200bx.", True) == "a\u200bx."  # characters are dropped: no alignment


class Window:
    """Two overlapping windows, in the form of a feature store."""

    context = "Steve Smith's dog  (Rex) barks"
    vocabulary = ["[CLS]", "[SEP]", "steve", "smith", "'", "s", "dog", "(", "rex", ")", "bark", "##s"]
    offsets = [(0, 5), (6, 11), (11, 12), (12, 13), (14, 17), (19, 20), (20, 23), (23, 24), (25, 29), (29, 30)]
    ids = np.arange(2, 12)
    example_index = np.array([0, 0])
    starts, lengths = (0, 4), (6, 6)

    def __init__(self):
        from qa_deepspeed.qa.data.examples import Example

        self.examples = [Example("q", "?", self.context)]

    def take(self, rows):
        from types import SimpleNamespace

        ids = [np.concatenate(([0], self.ids[self.starts[r] : self.starts[r] + self.lengths[r]], [1])) for r in rows]
        return SimpleNamespace(
            input_ids=np.concatenate(ids),
            row_splits=np.cumsum([0, *map(len, ids)]),
            context_begin=np.array([1 for _ in rows]),
            context_end=np.array([1 + self.lengths[r] for r in rows]),
        )

    def windows(self, rows):
        return np.array(self.starts)[rows], np.array(self.lengths)[rows]

    def character_spans(self, rows, starts, ends):
        at = [self.starts[r] - 1 for r in rows]
        begin = [self.offsets[s + a][0] for s, a in zip(starts, at, strict=True)]
        end = [self.offsets[e + a][1] for e, a in zip(ends, at, strict=True)]
        return np.array(begin, np.int64), np.array(end, np.int64)


def decoded(scores, nulls=((-3, -3), (-3, -3)), **how):
    """`scores` maps (window, start token, end token) of the context to the logits that make this pair win; `nulls` are
    the start and the end logit of each window's null position.
    """
    start, end = np.full((2, 2, 8), -50, np.float32)
    for (window, first, last), value in scores.items():
        start[window, 1 + first - Window.starts[window]] = value
        end[window, 1 + last - Window.starts[window]] = value
    start[:, 0], end[:, 0] = zip(*nulls, strict=True)
    text = ClassicText(wordpiece_joiner(Window.vocabulary), True)
    logits = FullLogits(np.arange(2), start, end)
    return next(decode_classic(logits, Window(), DecodeSettings(n_best_size=3, **how), text))


def test_texts_are_rebuilt_from_word_pieces():
    assert decoded({(0, 0, 1): 5}).text == "Steve Smith"
    assert decoded({(1, 8, 9): 5}).text == "barks"
    assert decoded({(1, 6, 6): 5}).text == "Rex"
    assert decoded({(1, 5, 6): 5}).text == "(Rex"


def test_start_counts_only_in_the_max_context_window():
    assert decoded({(0, 4, 5): 5, (1, 4, 6): 9}).text == "dog ("  # the fifth token: one to its right, none to its left
    assert decoded({(0, 5, 5): 9, (1, 5, 6): 5}).text == "(Rex"  # the sixth: none to its right, one to its left


def test_null_answer_is_ranked_and_threshold_decides():
    assert decoded({(0, 0, 1): 5}, version_2_with_negative=True).null_odds == -16.0
    assert decoded({(0, 0, 1): -10}, version_2_with_negative=True).text == ""
    assert decoded({(0, 0, 1): -10}, version_2_with_negative=True, null_score_diff_threshold=20.0).text == "Steve Smith"


def test_null_entry_has_both_logits_of_the_window_with_the_lowest_sum():
    how = {"version_2_with_negative": True, "nulls": ((2, 1), (4, -2))}
    for score in (5, -10):
        null = [entry[2:] for entry in decoded({(0, 0, 1): score}, **how).nbest if not entry[0]]
        assert null == [(4.0, -2.0, -1)]


def real_questions():
    """Questions of the longest paragraphs and some of the others, of both kinds."""
    articles = json.loads((DATA / "en-v2-dev.json").read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    paragraphs = sorted(paragraphs, key=lambda paragraph: -len(paragraph["context"]))[:20] + paragraphs[:20]
    return {
        "version": "v2.0",
        "data": [{"title": "t", "paragraphs": list({p["context"]: p for p in paragraphs}.values())}],
    }


def awkward_pairs():
    generator = random.Random(3)
    pieces = [
        "é",
        "E",
        "中",
        "’",
        "-",
        "(",
        ")",
        " ",
        "  ",
        "ß",
        "İ",
        "\u0301",
        "a",
        "Bc",
        "½",
        "\u200d",
        "\u00a0",
        "5%",
    ]
    pairs = []
    for _ in range(3000):
        original = "".join(generator.choices(pieces, k=generator.randint(1, 9)))
        tokens = basic_tokens(original, True)
        first = generator.randint(0, len(tokens))
        pairs.append((" ".join(tokens[first : first + generator.randint(1, 4)]), original))
    return pairs


def answers_of_transformers_4(folder, store, vocabulary, logits, how, lengths, pairs=()):
    """The answers of golden/classic_answers.py to these logits (start, end), each [features, length]."""
    np.savez(folder / "logits.npz", start=logits[0], end=logits[1])
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    task = {
        "questions": [(e.example_id, e.question, e.context) for e in store.examples],
        "vocabulary": str(folder / "vocab.txt"),
        "do_lower_case": True,
        "n_best_size": how.n_best_size,
        "max_answer_length": how.max_answer_length,
        "v2": how.version_2_with_negative,
        "threshold": how.null_score_diff_threshold,
        "pairs": pairs,
        **lengths,
    }
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    script = REPOSITORY / "tests" / "golden" / "classic_answers.py"
    paths = [folder / name for name in ("task.json", "logits.npz", "out.json", "odds.json")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([TRANSFORMERS_4, script, *paths], check=True, timeout=280, env=environment)
    return json.loads(Path(paths[2]).read_text())


@needs_real_data
@needs_real_model
@needs_transformers_4
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("digits", [5, 0])
def test_the_same_answers_as_transformers_4(tmp_path, v2, digits):
    from transformers import AutoConfig, AutoTokenizer

    from qa_deepspeed.qa.cache.prepare import prepare_features
    from qa_deepspeed.qa.data.reading import DataSource
    from qa_deepspeed.qa.features.build import FeatureSettings
    from qa_deepspeed.qa.features.families import family_of

    gold = tmp_path / "gold.json"
    gold.write_text(json.dumps(real_questions()), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    settings = FeatureSettings(max_seq_length=LENGTH, doc_stride=STEP, max_query_length=QUERY)
    family = family_of(AutoConfig.from_pretrained(MINILM), tokenizer)
    store = prepare_features(
        DataSource((str(gold),), "evaluate", True), tokenizer, family, settings, tmp_path / "cache"
    )
    generator = np.random.default_rng(digits)
    start, end = np.round(generator.normal(0, 3, (2, len(store), LENGTH)), digits).astype(np.float32)
    start[:, 0] += 6
    end[:, 0] += 6
    how = DecodeSettings(version_2_with_negative=v2, null_score_diff_threshold=-1.0)
    vocabulary = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    lengths = {"max_seq_length": LENGTH, "doc_stride": STEP, "max_query_length": QUERY}
    pairs = awkward_pairs()
    theirs = answers_of_transformers_4(tmp_path, store, vocabulary, (start, end), how, lengths, pairs)
    rows = store.take(np.arange(len(store)))
    ours_ids = [rows.input_ids[a:b].tolist() for a, b in zip(rows.row_splits, rows.row_splits[1:], strict=False)]
    assert ours_ids == theirs["input_ids"], "both must cut the same windows, or the logits are not of the same tokens"
    text = ClassicText(wordpiece_joiner(vocabulary), True)
    predictions = list(decode_classic(FullLogits(np.arange(len(store)), start, end), store, how, text))
    assert {p.example_id: p.text for p in predictions} == theirs["answers"]
    assert len(predictions) > 300
    if v2:
        assert 20 < sum(p.text == "" for p in predictions) < len(predictions) - 20
        assert {p.example_id: p.null_odds for p in predictions} == pytest.approx(theirs["null_odds"], abs=1e-9)
    assert [final_text(*pair, True) for pair in pairs] == theirs["texts"]
