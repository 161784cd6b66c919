"""Normalization of answers before they are compared: words without case, punctuation, articles and blanks.

English follows the official SQuAD scripts (https://rajpurkar.github.io/SQuAD-explorer/). The other languages follow
MLQA (https://github.com/facebookresearch/MLQA, mlqa_evaluation_v1.py): all Unicode punctuation is removed, articles are
the language's own, and text written without spaces is split into characters (mixed segmentation: words of other scripts
in between stay whole). Japanese and Thai, which MLQA lacks, follow its rule for Chinese.
"""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass

_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class _Language:
    articles: re.Pattern[str] | None = None
    units: re.Pattern[str] | None = None  # characters that are words of their own, in text without spaces
    ascii_punctuation_only: bool = False


def _words(*articles: str) -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join(articles)})\b")


_HAN_OF_MLQA = "\u4e00-\u9fa5"
_KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_KANJI = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ffff"
_THAI_ABOVE_OR_BELOW = "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"  # vowels and tones that combine with the letter before them

_LANGUAGES = {
    "en": _Language(_words("a", "an", "the"), ascii_punctuation_only=True),
    "es": _Language(_words("un", "una", "unos", "unas", "el", "la", "los", "las")),
    "de": _Language(
        _words("ein", "eine", "einen", "einem", "eines", "einer", "der", "die", "das", "den", "dem", "des")
    ),
    "vi": _Language(_words("của", "là", "cái", "chiếc", "những")),
    "ar": _Language(re.compile("ال")),
    "hi": _Language(),
    "zh": _Language(units=re.compile(f"[{_HAN_OF_MLQA}]")),
    "ja": _Language(units=re.compile(f"[{_KANA}{_KANJI}]")),
    "th": _Language(units=re.compile(f"[\u0e00-\u0e7f][{_THAI_ABOVE_OR_BELOW}]*")),
}

METRIC_LANGUAGES = tuple(_LANGUAGES)


def normalized_tokens(text: str, language: str = "en") -> list[str]:
    """The normalized words in order. Two answers match exactly if these lists are equal."""
    rules = _LANGUAGES[language]
    text = text.lower()
    if rules.ascii_punctuation_only:
        text = text.translate(_ASCII_PUNCTUATION)
    else:
        text = "".join(c for c in text if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    if rules.articles:
        text = rules.articles.sub(" ", text)
    if rules.units:
        text = rules.units.sub(r" \g<0> ", text)
    return text.split()
