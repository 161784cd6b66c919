"""The sample corpus and model: true to the SQuAD v2 format, held out, settled by the question, the same each time."""

import argparse
import collections
import hashlib
import json
import os
import random
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qa_deepspeed.cli.data import sample
from qa_deepspeed.qa.data.read_report import ReadReport
from qa_deepspeed.qa.data.reading import DataSource, read_examples
from qa_deepspeed.utils.errors import UserError
from tests.paths import REPOSITORY

SEEDS = (42, 7)


@pytest.fixture(scope="module", params=SEEDS)
def corpora(request):
    return sample.make_corpora(request.param, train_articles=120, dev_articles=80)


def questions_of(corpus):
    for article in corpus["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield article, paragraph, question


def fillers_of(corpus):
    return {answer["text"].lower() for _, _, question in questions_of(corpus) for answer in question["answers"]}


def test_answers_stand_at_their_offsets(corpora):
    for corpus in corpora:
        for _, paragraph, question in questions_of(corpus):
            assert question["is_impossible"] == (not question["answers"])
            for answer in question["answers"]:
                begin = answer["answer_start"]
                assert answer["text"]
                assert paragraph["context"][begin : begin + len(answer["text"])] == answer["text"]


def test_ids_are_unique_and_templates_are_filled(corpora):
    ids = [question["id"] for corpus in corpora for _, _, question in questions_of(corpus)]
    assert len(set(ids)) == len(ids)
    for corpus in corpora:
        for article, paragraph, question in questions_of(corpus):
            assert not set("{}") & set(article["title"] + paragraph["context"] + question["question"])


def test_at_least_a_quarter_is_unanswerable_in_articles_of_several_paragraphs(corpora):
    for corpus in corpora:
        impossible = [question["is_impossible"] for _, _, question in questions_of(corpus)]
        assert 0.25 <= sum(impossible) / len(impossible) <= 0.4
        assert all(len(article["paragraphs"]) > 1 for article in corpus["data"])


def test_held_out_articles_share_no_title_and_no_filler_with_training(corpora):
    train, dev = corpora
    assert not {a["title"] for a in train["data"]} & {a["title"] for a in dev["data"]}
    assert not fillers_of(train) & fillers_of(dev)
    # nor does a dev filler that is one word (a name or a figure) occur anywhere in the training text
    asked = [(paragraph["context"], question["question"]) for _, paragraph, question in questions_of(train)]
    texts = {text for both in asked for text in both}
    words = {word for text in texts for word in re.findall(r"\w+", text.lower())}
    assert not {filler for filler in fillers_of(dev) if " " not in filler} & words


def test_the_relation_asked_for_settles_the_answer(corpora):
    """Read back by the wordings: each relation is stated at most once; a question on one that is not has no answer."""
    kinds = sample.read_material().kinds
    for corpus in corpora:
        for number, article in enumerate(corpus["data"]):
            kind = kinds[number % len(kinds)]
            stated = {}
            for paragraph in article["paragraphs"]:
                for sentence in paragraph["context"].removesuffix(".").split(". "):
                    for relation, answer in read_back(sentence + ".", article, kind, "statements"):
                        assert relation not in stated, f"stated twice: {sentence}"
                        stated[relation] = answer
            asked = []
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    ((relation, _),) = read_back(question["question"], article, kind, "questions")
                    asked.append(relation)
                    texts = [answer["text"] for answer in question["answers"]]
                    assert texts == ([stated[relation]] if relation in stated else [])
            assert sorted(map(id, asked)) == sorted(map(id, kind.relations))


def read_back(sentence, article, kind, wordings):
    """The relations, each with its answer, whose statements or questions this sentence may be."""
    title = re.escape(article["title"][1:])
    subject = f"(?:[{article['title'][0]}{article['title'][0].lower()}]{title}|[Tt]he {kind.noun})"
    found = {}
    for relation in kind.relations:
        for wording in getattr(relation, wordings):
            pattern = re.escape(wording).replace(re.escape("{it}"), subject)
            match = re.fullmatch(pattern.replace(re.escape("{answer}"), r"(\S+(?: \S+){0,2})"), sentence)
            if match:
                found[relation] = match.group(1) if match.groups() else None
    assert len(found) <= 1, f"says two things: {sentence}"
    return list(found.items())


def test_names_never_repeat_and_figures_are_dealt_out():
    material = sample.read_material()
    taken: set[str] = set()
    makers = [sample.Fillers(material, random.Random(seed), taken, held_out=seed == 1) for seed in (0, 1)]
    names = [maker.name() for maker in makers for _ in range(500)]
    assert len(set(names)) == len(names)
    kinds = {relation.filler for kind in material.kinds for relation in kind.relations}
    for filler in kinds - {"person", "place", "firm"}:
        made, held_out = ({maker.make(filler) for _ in range(500)} for maker in makers)
        assert made and held_out and not made & held_out


def test_every_word_of_unseen_articles_splits_into_known_pieces(corpora, tmp_path):
    from transformers import AutoTokenizer

    train, dev = corpora
    sample.save_model(tmp_path, sample.train_vocabulary(train), seed=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.is_fast
    rows = [
        tokenizer(question["question"].upper(), paragraph["context"])["input_ids"]
        for _, paragraph, question in questions_of(dev)
    ]
    assert all(tokenizer.unk_token_id not in row for row in rows)
    assert max(map(len, rows)) <= 128
    assert tokenizer.tokenize("MAYOR") == ["mayor"]


def reference_pieces(words, merges):
    """Byte-pair merging by the book: join the best pair in every word's string of symbols, from the left."""
    vocabulary = {" ".join([word[0], *("##" + letter for letter in word[1:])]): n for word, n in words.items()}
    learned = []
    for _ in range(merges):
        pairs = collections.Counter()
        for line, count in vocabulary.items():
            symbols = line.split()
            for pair in zip(symbols, symbols[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            break
        first, second = sorted(pairs, key=lambda pair: (-pairs[pair], pair))[0]
        joined = first + second[2:]
        learned.append(joined)
        vocabulary = {re.sub(rf"(?<!\S){first} {second}(?!\S)", joined, line): n for line, n in vocabulary.items()}
    return learned


@given(st.dictionaries(st.text("abc", min_size=1, max_size=7), st.integers(1, 9), max_size=8), st.integers(0, 12))
def test_pieces_are_those_of_byte_pair_merging(words, merges):
    assert sample.learn_pieces(collections.Counter(words), merges) == reference_pieces(words, merges)


def write_in_a_process(directory, hash_seed):
    """The sample by the command's own functions in a fresh process; the digest of every file by name."""
    code = (
        "import sys; from pathlib import Path; from qa_deepspeed.cli.data import sample; "
        "sample.write_sample(Path(sys.argv[1]), 3, 30, 6)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code, str(directory)], env=environment, check=True, capture_output=True)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes_and_nothing_else_is_left(tmp_path):
    first = write_in_a_process(tmp_path / "one", hash_seed="1")
    assert first == write_in_a_process(tmp_path / "two", hash_seed="2")
    assert {"train.json", "dev.json", "sample.json", "model/config.json", "model/model.safetensors"} <= set(first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert sample.make_corpora(3, 30, 6) != sample.make_corpora(4, 30, 6)


def run_command(*arguments):
    parser = argparse.ArgumentParser()
    sample.add_arguments(parser)
    return sample.run(parser.parse_args(list(map(str, arguments))))


def test_a_sample_that_is_there_is_left_alone_and_other_files_are_safe(tmp_path, capsys):
    target = tmp_path / "deep" / "sample"
    arguments = (target, "--train_articles", 8, "--dev_articles", 4)
    assert run_command(*arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    assert "made" in capsys.readouterr().out
    assert run_command(*arguments) == 0
    assert "already there" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    with pytest.raises(UserError, match="other than this sample"):
        run_command(*arguments, "--seed", 5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.json").write_text("{}")
    with pytest.raises(UserError, match="other than this sample"):
        run_command(tmp_path / "mine")
    with pytest.raises(UserError, match="is a file"):
        run_command(tmp_path / "mine" / "train.json")


def test_the_reader_takes_every_question(corpora, tmp_path):
    for purpose, corpus in zip(("train", "evaluate"), corpora, strict=True):
        file = tmp_path / f"{purpose}.json"
        file.write_text(json.dumps(corpus))
        report = ReadReport()
        source = DataSource((str(file),), purpose, version_2_with_negative=True)
        read = list(read_examples(source, report))
        assert len(read) == sum(1 for _ in questions_of(corpus)) == report.usable
        assert not report.repaired and not report.rejected
