"""`sample DIR`: a corpus in SQuAD v2 format and a tiny untrained BERT, generated from a seed, to try the whole path.

The corpus is about invented towns, ships, festivals ... (sample_text.yaml). An article states each relation at most
once, so that the relation a question asks for settles its answer; a question is unanswerable where the article does
not state its relation. Names and figures of the held-out articles never occur in the training articles.
The same arguments give the same bytes.
"""

import argparse
import contextlib
import json
import random
import re
import string
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from qa_deepspeed.utils.errors import UserError
from qa_deepspeed.utils.files import os_errors_as_user_errors
from qa_deepspeed.utils.json_files import ANYTHING, DamagedFile, read_json

RECIPE = "sample.json"  # written into DIR: what made its contents
RECIPE_VERSION = 1  # raise it whenever the same arguments give other files

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
COMMON_WORD = 20  # occurrences from which a word is a token of its own
NAMES_READ = 1000  # rarer words from which the pieces are learned
NAME_PIECES = 300
MODEL_LENGTH = 256
MODEL_SIZE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "initializer_range": 0.06,  # at BERT's 0.02 the first hundreds of steps are lost
    "hidden_dropout_prob": 0.0,  # nothing is seen often enough to be memorized
    "attention_probs_dropout_prob": 0.0,
}
TRAIN_ARTICLES, DEV_ARTICLES = 4000, 90
PARAGRAPHS = 3
STATED_SHARE = 0.7  # of the relations of a kind, give or take one, are in an article; the others have no answer
HELD_OUT_SHARE = 4  # one figure, or combination of words, in so many is kept for the held-out articles


@dataclass(frozen=True)
class Relation:
    """One thing that can be said of a subject: the kind of its answer, and wordings with {it} and {answer}."""

    filler: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of subject: its noun, the pattern of its names, sentences that answer nothing, and its relations."""

    noun: str
    name: str
    asides: tuple[str, ...]
    relations: tuple[Relation, ...]


@dataclass(frozen=True)
class Material:
    """What articles are made of: parts of names, combinations of words (firsts, seconds) by filler, and kinds."""

    words: dict[str, list[str]]
    combinations: dict[str, tuple[list[str], list[str]]]
    kinds: tuple[Kind, ...]


def read_material() -> Material:
    """The contents of sample_text.yaml."""
    read = yaml.safe_load(_material_text())
    return Material(
        {part: words.split() for part, words in read["words"].items()},
        {filler: (two["firsts"].split(), two["seconds"].split()) for filler, two in read["combinations"].items()},
        tuple(_kind(noun, kind) for noun, kind in read["kinds"].items()),
    )


def _material_text() -> str:
    return resources.files("qa_deepspeed.cli.data").joinpath("sample_text.yaml").read_text(encoding="utf-8")


def _kind(noun: str, kind: dict[str, Any]) -> Kind:
    relations = (
        Relation(said["filler"], tuple(said["statements"].splitlines()), tuple(said["questions"].splitlines()))
        for said in kind["relations"]
    )
    return Kind(noun, kind["name"], tuple(kind["asides"].splitlines()), tuple(relations))


class Fillers:
    """Makes names and figures. Makers that share `taken` never make the same name, whatever their `held_out`; a maker
    for held-out articles and one for training never make the same figure or combination of words."""

    def __init__(self, material: Material, rng: random.Random, taken: set[str], held_out: bool) -> None:
        self.words = material.words
        self.combinations = material.combinations
        self.rng = rng
        self.taken = taken
        self.held_out = held_out

    def make(self, filler: str) -> str:
        """A new filler of a kind that sample_text.yaml names."""
        if filler in self.combinations:
            return self._combination(*self.combinations[filler])
        made: str = getattr(self, f"_{filler}")()
        return made

    def name(self) -> str:
        """A name that was never made before."""
        while True:
            syllables = (self._part("onsets") + self._part("vowels") for _ in range(self.rng.choice((1, 2))))
            name = ("".join(syllables) + self._part("codas")).capitalize()
            if name not in self.taken:
                self.taken.add(name)
                return name

    def _part(self, part: str) -> str:
        return self.rng.choice(self.words[part])

    def _mine(self, number: int) -> bool:
        return (number % HELD_OUT_SHARE == 1) == self.held_out

    def _number(self, low: int, high: int) -> int:
        while True:
            number = self.rng.randint(low, high)
            if self._mine(number):
                return number

    def _combination(self, firsts: list[str], seconds: list[str]) -> str:
        while True:
            first, second = self.rng.randrange(len(firsts)), self.rng.randrange(len(seconds))
            if self._mine(first + second):
                return f"{firsts[first]} {seconds[second]}"

    def _person(self) -> str:
        return f"{self.name()} {self.name()}"

    def _place(self) -> str:
        return self.name()

    def _firm(self) -> str:
        return f"{self.name()} {self._part('firms')}"

    def _year(self) -> str:
        return str(self._number(1200, 1999))

    def _date(self) -> str:
        months = self.words["months"]
        day = self._number(0, 28 * len(months) - 1)
        return f"{day % 28 + 1} {months[day // 28]}"

    def _metres(self) -> str:
        return f"{self._number(20, 999)} metres"

    def _tonnes(self) -> str:
        return f"{self._number(20, 999)} tonnes"

    def _crowns(self) -> str:
        return f"{self._number(20, 999)} crowns"

    def _days(self) -> str:
        return f"{self._number(2, 99)} days"

    def _count(self) -> str:
        return str(self._number(100, 999))


def _say(template: str, subject: str, answer: str = "") -> tuple[str, int]:
    """The sentence that a template makes, and where in it the answer starts (-1 where the template has none)."""
    sentence = template.replace("{it}", subject)
    start = sentence.find("{answer}")
    sentence = sentence.replace("{answer}", answer)
    return sentence[0].upper() + sentence[1:], start


class Writer:
    """Writes articles of the given kinds, in turn; `name` is the stem of their question ids."""

    def __init__(self, name: str, kinds: tuple[Kind, ...], rng: random.Random, fillers: Fillers) -> None:
        self.name = name
        self.kinds = kinds
        self.rng = rng
        self.fillers = fillers

    def corpus(self, articles: int) -> dict[str, Any]:
        """So many articles as the contents of a SQuAD v2 file."""
        return {"version": "v2.0", "data": [self.article(number) for number in range(articles)]}

    def article(self, number: int) -> dict[str, Any]:
        """Short paragraphs and a question for every relation of the kind; STATED_SHARE of them are stated."""
        kind = self.kinds[number % len(self.kinds)]
        title = kind.name.format(self.fillers.name())
        subjects = (title, f"the {kind.noun}")
        relations = self.rng.sample(kind.relations, len(kind.relations))
        stated = round(len(relations) * STATED_SHARE) + self.rng.choice((-1, 0, 1))
        parts = [self._paragraph(kind, subjects, relations[part:stated:PARAGRAPHS]) for part in range(PARAGRAPHS)]
        for relation in relations[stated:]:
            self.rng.choice(parts)[1].append((relation, []))
        ids = (f"{self.name}-{number:05d}-{question}" for question in range(len(relations)))
        paragraphs = [
            {"context": context, "qas": [self._question(next(ids), subjects, *asked) for asked in questions]}
            for context, questions in parts
        ]
        return {"title": title[0].upper() + title[1:], "paragraphs": paragraphs}

    def _paragraph(
        self, kind: Kind, subjects: tuple[str, str], stated: list[Relation]
    ) -> tuple[str, list[tuple[Relation, list[dict[str, Any]]]]]:
        """A context that states these relations in this order, and each of them with its answer."""
        aside_before = self.rng.randint(0, 3 * len(stated))  # mostly none
        context = ""
        questions = []
        for position, relation in enumerate(stated):
            if position == aside_before:
                context += self.rng.choice(kind.asides) + " "
            subject = subjects[0] if not context else self.rng.choice(subjects)
            answer = self.fillers.make(relation.filler)
            sentence, start = _say(self.rng.choice(relation.statements), subject, answer)
            text = sentence[start : start + len(answer)]
            questions.append((relation, [{"text": text, "answer_start": len(context) + start}]))
            context += sentence + " "
        return context.rstrip(), questions

    def _question(
        self, question_id: str, subjects: tuple[str, str], relation: Relation, answers: list[dict[str, Any]]
    ) -> dict[str, Any]:
        question, _ = _say(self.rng.choice(relation.questions), self.rng.choice(subjects))
        return {"id": question_id, "question": question, "answers": answers, "is_impossible": not answers}


def make_corpora(seed: int, train_articles: int, dev_articles: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The training and the held-out corpus of a seed, as the contents of SQuAD v2 files."""
    material = read_material()
    taken = {word.capitalize() for word in re.findall(r"[A-Za-z]+", _material_text())}  # no name is a word of ours
    corpora = []
    for name, articles in (("train", train_articles), ("dev", dev_articles)):
        rng = random.Random(f"{name} {seed}")
        corpora.append(
            Writer(name, material.kinds, rng, Fillers(material, rng, taken, held_out=name == "dev")).corpus(articles)
        )
    return corpora[0], corpora[1]


def _words(corpus: dict[str, Any]) -> Counter[str]:
    """The lower-case words of a corpus and how often each occurs; figures and punctuation stand alone."""
    counts: Counter[str] = Counter()
    for article in corpus["data"]:
        for paragraph in article["paragraphs"]:
            for text in (paragraph["context"], *(question["question"] for question in paragraph["qas"])):
                counts.update(re.findall(r"[a-z]+|[0-9]+|[^\sa-z0-9]", text.lower()))
    return counts


def learn_pieces(words: Counter[str], merges: int) -> list[str]:
    """Word pieces by byte-pair merging: the commonest pair of neighbours becomes one piece, so many times over; the
    lesser in the alphabet where two pairs are equally common, which the tokenizers library leaves to chance.

    Sennrich et al. 2016, Neural Machine Translation of Rare Words with Subword Units, algorithm 1.
    """
    splits = {word: [word[0], *("##" + letter for letter in word[1:])] for word in sorted(words)}
    learned = []
    for _ in range(merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in splits.items():
            for pair in zip(pieces, pieces[1:], strict=False):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merged = best[0] + best[1].removeprefix("##")
        learned.append(merged)
        for pieces in splits.values():
            place = 0
            while place < len(pieces) - 1:
                if (pieces[place], pieces[place + 1]) == best:
                    pieces[place : place + 2] = [merged]
                place += 1
    return learned


def train_vocabulary(corpus: dict[str, Any]) -> list[str]:
    """A WordPiece vocabulary of a training corpus: all characters (so that no name is unknown), its common words whole,
    and pieces of the rest, which are names. Figures stay single, so that new numbers look like known ones.
    """
    counts = Counter({word: count for word, count in _words(corpus).items() if word.isalpha()})
    characters = sorted({*string.ascii_lowercase, *string.digits, *string.punctuation})
    inner = ["##" + character for character in string.ascii_lowercase + string.digits]
    common = sorted(word for word, count in counts.items() if count >= COMMON_WORD)
    rare = [word for word, count in counts.items() if count < COMMON_WORD][:NAMES_READ]
    pieces = learn_pieces(Counter({word: counts[word] for word in rare}), NAME_PIECES)
    return list(dict.fromkeys([*SPECIAL_TOKENS, *characters, *inner, *common, *pieces]))


def save_model(directory: Path, vocabulary: list[str], seed: int) -> None:
    """A lower-case BERT tokenizer of this vocabulary and a small BERT with random weights, as a Transformers model."""
    import torch  # here, since a sample that is already there needs neither
    from transformers import BertConfig, BertForQuestionAnswering, BertTokenizer

    from qa_deepspeed.models.loading import quiet_transformers

    quiet_transformers(verbose=False)
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, model_max_length=MODEL_LENGTH)
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=MODEL_LENGTH, **MODEL_SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForQuestionAnswering(config)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


def write_sample(directory: Path, seed: int, train_articles: int, dev_articles: int) -> bool:
    """Makes the sample in `directory`, whole or not at all; False if it is there already.

    Raises UserError where the folder holds anything else.
    """
    recipe = {"recipe": RECIPE_VERSION, "seed": seed, "train_articles": train_articles, "dev_articles": dev_articles}
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file: name a folder for the sample")
    if directory.is_dir() and any(directory.iterdir()):
        with contextlib.suppress(DamagedFile):
            if read_json(directory / RECIPE, ANYTHING) == recipe:
                return False
        raise UserError(f"{directory} holds something other than this sample: delete it or name another folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as building:
        target = Path(building) / "sample"
        target.mkdir()
        train, dev = make_corpora(seed, train_articles, dev_articles)
        for name, content in (("train.json", train), ("dev.json", dev), (RECIPE, recipe)):
            (target / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        save_model(target / "model", train_vocabulary(train), seed)
        target.replace(directory)
    return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sample`."""
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="folder to make: train.json, dev.json (SQuAD v2), model/ (BERT)")
    add("--seed", type=int, default=42, help="another seed gives other articles and weights (default %(default)s)")
    add("--train_articles", type=_positive, default=TRAIN_ARTICLES, help="to train on (default %(default)s)")
    add("--dev_articles", type=_positive, default=DEV_ARTICLES, help="held out (default %(default)s)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Makes the sample and says what is in it.

    Raises:
        UserError: the folder holds something else or cannot be written.
    """
    with os_errors_as_user_errors(arguments.directory):
        made = write_sample(arguments.directory, arguments.seed, arguments.train_articles, arguments.dev_articles)
    print(f"{'made' if made else 'already there'}: {arguments.directory}/train.json, dev.json and model/")
    return 0
