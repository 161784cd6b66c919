"""Tokenizers written in Python (XLM, FlauBERT, PhoBERT, ByT5, ...): they give no offsets, so these are found here.

Slower than fast tokenizers by far: every character passes through Python. The tokens are always the tokenizer's own;
only where they stand in the text is worked out, character by character where the tokens spell the text, word by word
where the tokenizer takes words one at a time, and otherwise by the next place where both agree again.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qa_deepspeed.qa.features.encoding import Tokens, special_tokens
from qa_deepspeed.qa.features.windows import splits_of

SUFFIXES, PREFIXES = ("</w>", "@@"), ("##", "▁", "Ġ")
"""Marks of the end of a word, of going on, and of the start of a word in the vocabularies of such tokenizers."""

MARK_SHARE = 0.02
"""A mark counts as one where at least this fraction of the vocabulary has it."""

REMEMBERED = 50_000
"""Words whose tokens are remembered."""

LOOK_AHEAD = 40
"""Characters, of text and tokens together, among which the next place of agreement is looked for."""

AGREE = 3
"""Characters that must agree before text and tokens count as together again."""

UNKNOWN = "\ufffd"
"""What an unknown token spells in a text where its name stands."""

Span = tuple[int, int]


class PythonEncoder:
    """Texts to tokens by a tokenizer without a fast form. Text is text, as for `FastEncoder`."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known: dict[str, list[str]] = {}
        vocabulary = list(tokenizer.get_vocab())
        enough = max(2, MARK_SHARE * len(vocabulary))
        self._suffixes = [mark for mark in SUFFIXES if sum(one.endswith(mark) for one in vocabulary) >= enough]
        self._prefixes = [mark for mark in PREFIXES if sum(one.startswith(mark) for one in vocabulary) >= enough]
        self._special = frozenset(special_tokens(tokenizer))
        added = {token.content for token in tokenizer.added_tokens_decoder.values()} - self._special
        self._added = re.compile(f"({_any_of(added)})")
        self._spelled = re.compile(f"(?={_any_of(token for token in self._special if len(token) > 1)})")

    def encode(self, texts: Sequence[str], offsets: bool) -> Tokens:
        """Encode texts without special tokens, each on its own."""
        ids: list[int] = []
        spans: list[Span] = []
        lengths = []
        for text in texts:
            tokens = self.tokenize(text)
            ids += self._tokenizer.convert_tokens_to_ids(tokens)
            lengths.append(len(tokens))
            if offsets:
                spans += self.spans(text, tokens)
        places = np.array(spans, dtype=np.int32).reshape(-1, 2)
        return Tokens(
            np.array(ids, dtype=np.int32),
            np.ascontiguousarray(places[:, 0]),
            np.ascontiguousarray(places[:, 1]),
            splits_of(np.array(lengths, dtype=np.int64)),
        )

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text; where it spells special tokens, those of the characters."""
        if not self._spelled.search(text):
            plain: list[str] = self._tokenizer.tokenize(text)
            return plain
        # A tokenizer that is to split special tokens forgets the words that were added to its vocabulary.
        parts = self._added.split(text)
        tokens = [[part] if number % 2 else self._without_special(part) for number, part in enumerate(parts) if part]
        return [token for part in tokens for token in part]

    def _without_special(self, text: str) -> list[str]:
        tokens: list[str] = self._tokenizer.tokenize(text, split_special_tokens=True)
        if self._special.isdisjoint(tokens):
            return tokens
        # Some keep them whole nevertheless: the text is cut inside each special token, so that none matches.
        cuts = [0, *(match.start() + 1 for match in self._spelled.finditer(text)), len(text)]
        parts = [text[begin:end] for begin, end in pairwise(cuts)]
        return [token for part in parts for token in self._tokenizer.tokenize(part, split_special_tokens=True)]

    def spans(self, text: str, tokens: list[str]) -> list[Span]:
        """The characters [begin, end) of each token of the text, in order."""
        surfaces = self._surfaces(text, tokens)
        if fold(text)[0] == "".join(fold(surface)[0] for surface in surfaces):
            return align(text, surfaces)
        letters = [self._alone(letter) for letter in text]
        if [token for one in letters for token in one] == tokens:
            return [(at, at + 1) for at, one in enumerate(letters) for _ in one]
        words = [(match.start(), match.group()) for match in re.finditer(r"\S+", text)]
        if [token for _, word in words for token in self._alone(word)] == tokens:
            return [
                (at + begin, at + end)
                for at, word in words
                for begin, end in align(word, self._surfaces(word, self._alone(word)))
            ]
        return align(text, surfaces)

    def _alone(self, piece: str) -> list[str]:
        """The tokens of a word or letter on its own, remembered."""
        if piece not in self._known:
            if len(self._known) > REMEMBERED:
                self._known.clear()
            self._known[piece] = self.tokenize(piece)
        return self._known[piece]

    def _surfaces(self, text: str, tokens: list[str]) -> list[str]:
        """What each token spells; an unknown token is not taken for the text that spells its name."""
        unknown = self._tokenizer.unk_token
        named = bool(unknown) and unknown.lower() in text.lower()
        return [UNKNOWN if named and token == unknown else self._surface(token) for token in tokens]

    def _surface(self, token: str) -> str:
        """The token without the marks of the vocabulary."""
        for mark in self._suffixes:
            if token.endswith(mark) and token != mark:
                token = token[: -len(mark)]
        for mark in self._prefixes:
            if token.startswith(mark) and token != mark:
                token = token[len(mark) :]
        return token


def _any_of(words: Iterable[str]) -> str:
    """A pattern that matches each of these words, the longest that fits; nothing without words."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)"


def align(text: str, surfaces: list[str]) -> list[Span]:
    """The characters [begin, end) of each surface in the text, in order; both may differ in case, accents and more.

    A surface of which nothing is found has no width and stands where the one before it ends.
    """
    wanted, owners = "", []
    for number, surface in enumerate(surfaces):
        folded, _ = fold(surface)
        wanted += folded
        owners += [number] * len(folded)
    given, places = fold(text)
    spans: list[Span | None] = [None] * len(surfaces)
    at = next_at = 0
    while at < len(given) and next_at < len(wanted):
        if given[at] == wanted[next_at]:
            there, here = 1, 1
        else:
            there, here = _resync(given, wanted, at, next_at)
        for step in range(here):
            owner = owners[next_at + step]
            first, last = (at + step, at + step) if there == here else (at, at + there - 1)
            if there and (span := spans[owner]) is not None:
                spans[owner] = (min(span[0], places[first][0]), max(span[1], places[last][1]))
            elif there:
                spans[owner] = (places[first][0], places[last][1])
        at, next_at = at + there, next_at + here
    # What was not found stands where the one before it ends; then spans that share characters are put in order.
    found: list[Span] = []
    for one in spans:
        before = found[-1][1] if found else 0
        found.append(one if one is not None else (before, before))
    for number in range(1, len(found)):
        found[number] = (found[number][0], max(found[number][1], found[number - 1][1]))
    for number in range(len(found) - 1, 0, -1):
        found[number - 1] = (min(found[number - 1][0], found[number][0]), found[number - 1][1])
    return found


def _resync(given: str, wanted: str, at: int, next_at: int) -> tuple[int, int]:
    """How many characters of text and of tokens to pass over, at least one in all, until both agree again.

    The fewest in all; where there is no such place nearby, one of each.
    """
    left, right = len(given) - at, len(wanted) - next_at
    for total in range(1, min(LOOK_AHEAD, left + right)):
        fits = range(max(0, total - right), min(total, left) + 1)
        # Equal numbers first: a character that was replaced by another is the commonest difference.
        for there in sorted(fits, key=lambda count: abs(2 * count - total)):
            here = total - there
            one, other = given[at + there : at + there + AGREE], wanted[next_at + here : next_at + here + AGREE]
            if one == other and one:
                return there, here
    return 1, 1


def fold(text: str) -> tuple[str, list[Span]]:
    """The text as letters to compare by, and the characters [begin, end) that each of them stands for.

    Lower case, compatibility forms taken apart, without accents, blanks and control characters. An accent of its own
    belongs to the letter before it.
    """
    folded: list[str] = []
    places: list[Span] = []
    for at, character in enumerate(text):
        letters, accent = _folded(character)
        if accent and places and places[-1][1] == at:
            places[-1] = (places[-1][0], at + 1)
        folded.append(letters)
        places += [(at, at + 1)] * len(letters)
    return "".join(folded), places


@lru_cache(maxsize=100_000)
def _folded(character: str) -> tuple[str, bool]:
    """Letters to compare by, and whether the character is an accent."""
    parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).lower())
    letters = "".join(part for part in parts if not unicodedata.category(part).startswith(("M", "Z", "C")))
    return letters, not letters and unicodedata.category(character).startswith("M")


def serialize_python(tokenizer: Any) -> str:
    """What stands for the whole state of a Python tokenizer: its class and a digest of all that it saves."""
    with tempfile.TemporaryDirectory(prefix="qa_deepspeed_tokenizer_") as folder:
        tokenizer.save_pretrained(folder)
        digest = hashlib.sha256()
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__} {digest.hexdigest()}"
