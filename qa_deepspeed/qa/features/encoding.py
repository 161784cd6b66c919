"""Texts to arrays of tokens by a fast tokenizer, without touching single tokens in Python."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import Unigram

from qa_deepspeed.qa.features.windows import splits_of

BATCH_CHARACTERS = 250_000
"""Texts are encoded this many characters at a time: enough to keep the threads busy, little enough to stay small."""


@dataclass(frozen=True)
class Tokens:
    """Tokenized texts, ragged: ids and character offsets `[tokens]`, splits `[texts + 1]`.

    The offsets are empty if they were not asked for. word int32 `[tokens]`: the number of the word in its text that a
    token is of, as the tokenizer's pre-tokenizer cuts them; -1 for none. None from an encoder that does not tell.
    """

    ids: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    splits: np.ndarray
    word: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 `[texts]`."""
        return np.diff(self.splits)


class Encoder(Protocol):
    """What turns texts into tokens."""

    def encode(self, texts: Sequence[str], offsets: bool) -> Tokens:
        """Encode texts without special tokens, each on its own."""


class FastEncoder:
    """Texts to tokens by a private copy of a fast tokenizer, free of whatever truncation was left switched on.

    Text is text: where it spells a special token (`</s>`, `[SEP]`), its characters are encoded.
    """

    def __init__(self, tokenizer: Any, words: bool = False):
        """words: whether texts that are encoded with offsets get word numbers too."""
        self._tokenizer = _copy_for_text(tokenizer)
        self._words = words

    def encode(self, texts: Sequence[str], offsets: bool) -> Tokens:
        """Encode texts without special tokens; a single text may have any length."""
        encode = self._tokenizer.encode_batch if offsets else self._tokenizer.encode_batch_fast
        ids, places, words, lengths = [], [], [], []
        for batch in _batches(texts):
            encodings = encode(batch, add_special_tokens=False)
            counts = [len(encoding) for encoding in encodings]
            lengths += counts
            total = sum(counts)
            ids.append(np.fromiter(chain.from_iterable(one.ids for one in encodings), np.int32, total))
            if offsets:
                pairs = chain.from_iterable(chain.from_iterable(one.offsets for one in encodings))
                places.append(np.fromiter(pairs, np.int32, 2 * total).reshape(-1, 2))
                if self._words:
                    numbers = chain.from_iterable(one.word_ids for one in encodings)
                    words.append(np.fromiter((-1 if one is None else one for one in numbers), np.int32, total))
        place = _joined(places, (0, 2))
        return Tokens(
            _joined(ids, (0,)),
            np.ascontiguousarray(place[:, 0]),
            np.ascontiguousarray(place[:, 1]),
            splits_of(np.array(lengths, dtype=np.int64)),
            _joined(words, (0,)) if self._words and offsets else None,
        )


def _joined(parts: list[np.ndarray], empty: tuple[int, ...]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(empty, dtype=np.int32)


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The spellings of a tokenizer's special tokens, sorted: those listed as special, and named ones (`sep_token`)."""
    listed = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(listed.union(tokenizer.all_special_tokens)))


def _copy_for_text(tokenizer: Any) -> Tokenizer:
    """A copy of a fast tokenizer that finds no special token in a text, but for the unknown token.

    The library can leave out its search for special tokens. A model that looks up words as a whole would still find
    some, and so would Unigram, which has them among its pieces: there they get spellings that no text has.
    """
    special, state = special_tokens(tokenizer), serialize(tokenizer)
    listed = all(token.special for token in tokenizer.added_tokens_decoder.values() if token.content in special)
    if listed and not isinstance(tokenizer.backend_tokenizer.model, Unigram):
        copy = _without_search(state)
        if not any(_is_one_piece(copy, token) for token in special):
            return copy
    return _without_search(_respelled(state, special))


def _without_search(state: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(state)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _is_one_piece(tokenizer: Tokenizer, text: str) -> bool:
    return bool(tokenizer.encode(text, add_special_tokens=False).ids == [tokenizer.token_to_id(text)])


def _respelled(state: str, special: Sequence[str]) -> str:
    """The state of a tokenizer with these tokens special and renamed to strings that cannot occur in text; ids stay.

    A single character, or what merges make, comes from ordinary text: it keeps its name.
    """
    content = json.loads(state)
    model = content["model"]
    merged = {"".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model.get("merges", ())}
    names = {
        token: f"\uffff{number}\uffff"  # a code point that is no character
        for number, token in enumerate(special)
        if len(token) > 1 and token not in merged
    }
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    for token in content["added_tokens"]:
        token["special"] = token["special"] or token["content"] in special
        token["content"] = names.get(token["content"], token["content"])
    return json.dumps(content)


def serialize(tokenizer: Any) -> str:
    """The whole state of a fast tokenizer as JSON, less truncation and padding."""
    with truncation_kept(tokenizer):
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        serialized: str = tokenizer.backend_tokenizer.to_str()
        return serialized


@contextmanager
def truncation_kept(tokenizer: Any) -> Iterator[None]:
    """Put truncation and padding of a fast tokenizer back: calls leave theirs behind, to be saved with it."""
    if not tokenizer.is_fast:
        yield
        return
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        backend.no_truncation()
        backend.no_padding()
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
