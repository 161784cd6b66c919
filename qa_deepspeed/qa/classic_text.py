"""The classic scripts' way from predicted word pieces back to the text as written.

Rules: `BasicTokenizer` of BERT and `get_final_text` of SQuAD (https://github.com/google-research/bert, tokenization.py
and run_squad.py; in Transformers 4 under models/bert/tokenization_bert.py and data/metrics/squad_metrics.py).
"""

from __future__ import annotations

import re
import string
import unicodedata
from functools import lru_cache

_BLANKS = " \t\r\n"
_HAN = re.compile(
    "([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f])"
)


def basic_tokens(text: str, do_lower_case: bool) -> list[str]:
    """Words, punctuation marks and Han characters, each by itself; lower case also takes off the accents."""
    cleaned = "".join(_cleaned(character) for character in text)
    words = unicodedata.normalize("NFC", _HAN.sub(r" \1 ", cleaned)).split()
    if do_lower_case:
        words = [_without_accents(word.lower()) for word in words]
    return "".join(f" {c} " if _is_punctuation(c) else c for c in " ".join(words)).split()


def _cleaned(character: str) -> str:
    if character in _BLANKS or unicodedata.category(character) == "Zs":
        return " "
    return "" if character == "\ufffd" or unicodedata.category(character)[0] == "C" else character


def _without_accents(word: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", word) if unicodedata.category(c) != "Mn")


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character)[0] == "P"


@lru_cache(maxsize=4096)
def final_text(predicted: str, original: str, do_lower_case: bool) -> str:
    """The part of `original` (whole words) that the tokenised `predicted` stands for.

    Both are aligned by their characters other than spaces; where that fails, all of `original` is the answer.
    """
    tokenized = " ".join(basic_tokens(original, do_lower_case))
    begin = tokenized.find(predicted)
    if begin < 0:
        return original
    end = begin + len(predicted) - 1
    places = [place for place, character in enumerate(original) if character != " "]
    order = {place: i for i, place in enumerate(p for p, c in enumerate(tokenized) if c != " ")}
    if len(places) != len(order) or begin not in order or end not in order:
        return original
    return original[places[order[begin]] : places[order[end]] + 1]
