"""The audit's numbers against the tokenizer's own, and its command line on made, real and broken files."""

import json
import random
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qa_deepspeed.cli.main import main
from qa_deepspeed.qa.features.build import FeatureSettings, check_settings
from qa_deepspeed.qa.features.length_stats import Sizes, histogram, padding_ratio, quantiles, suggest
from qa_deepspeed.qa.features.windows import cut_windows
from tests.paths import DATA, MINILM, REPOSITORY, needs_real_data, needs_real_model

BROKEN = REPOSITORY / "tests" / "data" / "broken"


def test_without_a_model_it_says_what_was_read(capsys, tmp_path):
    """Counts, rejected questions and examples are those with a model; tokens are left out."""
    path = made_file(tmp_path / "made.json")
    squad = json.loads(path.read_text())
    squad["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["text"] = "green"
    path.write_text(json.dumps(squad))
    with pytest.raises(SystemExit) as ended:
        main(["audit", str(path), "--show", "1"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "199" in out and "[blue]" in out and "--model_name_or_path" in out and "windows (" not in out
    with pytest.raises(SystemExit):
        main(["audit", str(path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["questions"]["usable"] == len(found["examples"]) == 199 and len(found["rejected"]) == 1
    assert found["model"] is None and "windows" not in found


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A folder with the config and the tokenizer of a BERT whose pieces are three words and all characters."""
    import transformers

    characters = string.ascii_lowercase + string.digits + string.punctuation
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, "it", "is", "blue", *characters, *(f"##{character}" for character in characters)]
    folder = tmp_path_factory.mktemp("small-model")
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    transformers.BertTokenizer(vocab=vocabulary, model_max_length=512).save_pretrained(folder)
    transformers.BertConfig(vocab_size=len(pieces)).save_pretrained(folder)
    return folder


def made_file(path):
    """200 questions of all lengths, three to a context."""
    generator = random.Random(4)
    paragraphs = []
    for number in range(200):
        if number % 3 == 0:
            words = " ".join(generator.choices(["it", "is", "blue"], k=generator.randint(5, 300)))
            paragraphs.append({"context": f"{words} blue.", "qas": []})
        context = paragraphs[-1]["context"]
        answers = [{"text": "blue", "answer_start": context.index("blue")}]
        question = " ".join(generator.choices(["is", "it"], k=generator.randint(1, 20))) + "?"
        paragraphs[-1]["qas"].append({"id": str(number), "question": question, "answers": answers})
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


def audit(capsys, model, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["audit", *map(str, arguments), "--model_name_or_path", str(model)])
    shown = capsys.readouterr()
    return ended.value.code, shown.out, shown.err


def whole_row_lengths(path, tokenizer, max_query_length):
    """By the tokenizer, one question at a time."""
    lengths = []
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            context = len(tokenizer(paragraph["context"], add_special_tokens=False)["input_ids"])
            for asked in paragraph["qas"]:
                question = len(tokenizer(asked["question"], add_special_tokens=False)["input_ids"])
                lengths.append(context + min(question, max_query_length) + 3)
    return np.array(lengths)


def assert_numbers_are_those_of_the_tokenizer(capsys, model, path, stride, questions):
    import transformers

    flags = ("--max_seq_length", 160, "--max_query_length", 12, "--doc_stride", stride[0], "--doc_stride_is", stride[1])
    code, out, _ = audit(capsys, model, path, "--json", *flags)
    found = json.loads(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    lengths = whole_row_lengths(path, tokenizer, 12)
    assert code == 0
    assert found["lengths"] == {**quantiles(lengths), "histogram": histogram(lengths)}
    assert found["questions"]["usable"] == len(lengths) == questions
    assert found["questions"]["cut"] > 0
    assert found["windows"]["questions_with_one"] == (lengths <= 160).sum() < questions
    # The same suggestion must come out whatever settings the audit was made with, up to the labelled answers' length.
    assert found["suggestion"]["max_seq_length"] == int(np.ceil(np.sort(lengths)[int(0.95 * questions)] / 32) * 32)


STRIDES = pytest.mark.parametrize("stride", [("96", "step"), ("32", "overlap")], ids=" ".join)


@STRIDES
def test_lengths_and_windows_are_those_of_the_tokenizer(capsys, stride, small_model, tmp_path):
    path = made_file(tmp_path / "made.json")
    assert_numbers_are_those_of_the_tokenizer(capsys, small_model, path, stride, 200)


@needs_real_data
@needs_real_model
@pytest.mark.real
@STRIDES
def test_lengths_and_windows_of_a_real_file(capsys, stride):
    assert_numbers_are_those_of_the_tokenizer(capsys, MINILM, DATA / "en-v1-dev.json", stride, 807)


def test_verdicts_are_shown_and_strict_fails_on_a_rejected_question(capsys, small_model):
    path = BROKEN / "text_absent.json"
    code, out, _ = audit(capsys, small_model, path)
    assert code == 0
    assert "answer text not in the context" in out
    assert f"{path}: data[0].paragraphs[0].qas[1]" in out
    assert audit(capsys, small_model, path, "--strict")[0] == 1
    code, out, _ = audit(capsys, small_model, path, "--strict", "--json")
    assert code == 1
    assert json.loads(out)["questions"]["rejected_by_reason"] == {"answer text not in the context": 1}
    assert audit(capsys, small_model, REPOSITORY / "tests/data/repairable/start_one_late.json", "--strict")[0] == 0


def test_findings_of_a_small_file_with_mapped_columns(capsys, small_model, tmp_path):
    long = " ".join(f"word{number}" for number in range(300))
    rows = [
        {"key": 1, "question": "What?", "context": "It is blue.", "answers": {"text": ["blue"], "answer_start": [6]}},
        {"key": 2, "question": "What?", "context": "It is blue.", "answers": {"text": ["blue"], "answer_start": [6]}},
        {"key": 3, "question": "What?", "context": "It is blue.", "answers": {"text": [], "answer_start": []}},
        {"key": 4, "question": "All?", "context": long, "answers": {"text": [long], "answer_start": [0]}},
        {"key": 4, "question": "Who?", "context": "It is blue.", "answers": {"text": ["blue"], "answer_start": [6]}},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--id_column", "key", "--version_2_with_negative", "--max_answer_length", 3)
    found = json.loads(audit(capsys, small_model, str(path).replace("rows", "r*"), "--json", *flags)[1])
    expected = {"usable": 4, "unanswerable": 1, "repeated": 2, "rejected": 1, "repaired": 0}
    assert {name: found["questions"][name] for name in expected} == expected
    assert found["answers"] == {"longest": 1, "longer_than_max_answer_length": 0, "in_no_window": 1}
    assert found["windows"]["questions_with_one"] == 3
    assert found["rejected"] == [{"example_id": "4", "where": f"{path}: line 5", "reason": "duplicate id"}]


def test_questions_are_shown_as_they_were_read(capsys, small_model, tmp_path):
    """Starts count UTF-16 units; the brackets stand around the answers."""
    context = "😀 One came. 😀 Two came. 😀 Three came."
    units = [len(context[: context.index(word)].encode("utf-16-le")) // 2 for word in ("Two", "Three")]
    answers = [{"text": text, "answer_start": start} for text, start in zip(("Two", "Three"), units, strict=True)]
    rows = [{"question": f"Who, {n}?", "context": context, "answers": answers} for n in range(3)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    code, out, _ = audit(capsys, small_model, path, "--show", "2")
    assert code == 0 and out.count("😀 One came. 😀 [Two] came. 😀 [Three] came.") == 2
    assert "rows.json: answer_start counts UTF-16 units: 6 of 6 answers match" in out
    found = json.loads(audit(capsys, small_model, path, "--json")[1])
    assert [one["question"] for one in found["examples"]] == ["Who, 0?", "Who, 1?", "Who, 2?"]
    for example in found["examples"]:
        assert [example["context"][one["answer_start"] :][:3] for one in example["answers"]] == ["Two", "Thr"]
    assert found["questions"]["ids_made"] == 3


def test_what_cannot_be_read_is_an_error_of_one_line(capsys, tmp_path):
    path = tmp_path / "d.json"
    path.write_text('{"data": [')
    code, out, err = audit(capsys, "anything", path)
    assert (code, out) == (2, "")
    assert err.startswith(f"qa-deepspeed: error: {path}: line 1, column") and err.count("\n") == 1


@given(
    st.lists(st.tuples(st.integers(1, 900), st.integers(4, 67), st.integers(0, 40)), min_size=1, max_size=30),
    st.sampled_from([128, 512, 514, None]),
)
def test_suggested_settings_are_accepted_and_every_answer_stands_whole_in_a_window(examples, longest_row):
    context, beside, answer = (np.array(column) for column in zip(*examples, strict=True))
    answer = np.minimum(answer, context)
    found = suggest(Sizes(np.ones_like(context), context, beside, answer), 3, 64, longest_row)
    length, stride = found["max_seq_length"], found["doc_stride"]
    check_settings(FeatureSettings(max_seq_length=length, doc_stride=stride), 3)
    assert longest_row is None or length <= longest_row
    assert length == longest_row or (context + beside <= length).mean() >= 0.95
    example, begin, tokens = cut_windows(context, length - beside, np.full_like(context, stride))
    assert (found["windows"], found["tokens"]) == (len(example), (tokens + beside[example]).sum())
    for one in range(len(context)):
        windows = [(b, b + n) for e, b, n in zip(example, begin, tokens, strict=True) if e == one]
        last_places = range(context[one] - answer[one] + 1)
        assert all(any(b <= at and at + answer[one] <= end for b, end in windows) for at in last_places)


def test_a_model_too_short_for_the_questions_has_no_suggestion():
    one = np.array([9])
    assert suggest(Sizes(one, one, one, one), 3, 64, 60) == {}


@given(st.lists(st.integers(0, 20000), max_size=50))
def test_every_length_is_in_one_bin(lengths):
    bins = histogram(np.array(lengths, dtype=np.int64))
    for one in bins:
        count = sum(one["above"] < length <= (one["to"] or 10**9) for length in lengths if length)
        zeros = lengths.count(0) if one["above"] == 0 else 0
        assert one["questions"] == count + zeros
    assert sum(one["questions"] for one in bins) == len(lengths)


def test_padding_by_hand():
    lengths = np.array([10, 8, 3, 3])
    assert padding_ratio(lengths, [np.array([0, 1]), np.array([2, 3])], 1) == pytest.approx(1 - 24 / 26)
    assert padding_ratio(lengths, [np.array([0, 1]), np.array([2, 3])], 8) == pytest.approx(1 - 24 / 48)
