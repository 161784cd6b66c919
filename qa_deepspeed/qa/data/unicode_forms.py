"""Find a text in a context of another Unicode form (NFC, NFD, compatibility characters), as a slice of the context."""

from __future__ import annotations

import unicodedata


def find_other_form(context: str, text: str, near: int, distance: int) -> tuple[int, int] | None:
    """Begin and end of the place in `context` that equals `text` when both are normalized to NFKC.

    Of several places, the only one at most `distance` characters from `near` counts. None if there is no such place, or
    if it would begin or end within a character with its combining marks.
    """
    if context.isascii() and text.isascii():
        return None
    normalized, begins = _normalized_with_places(context)
    wanted, _ = _normalized_with_places(text)
    if not wanted.strip():
        return None
    found = []
    place = normalized.find(wanted)
    while place >= 0:
        begin, end = begins[place], begins[place + len(wanted)]
        if begin is not None and end is not None:
            found.append((begin, end))
        place = normalized.find(wanted, place + 1)
    if len(found) > 1:
        found = [span for span in found if abs(span[0] - near) <= distance]
    return found[0] if len(found) == 1 else None


def _normalized_with_places(text: str) -> tuple[str, list[int | None]]:
    """A text in NFKC, and for each of its characters and its end the place in `text` where its cluster begins.

    A cluster is a character with the combining marks, or the vowels and finals of a Hangul syllable, after it; None
    stands inside of one that becomes several.
    """
    parts: list[str] = []
    places: list[int | None] = []
    begin = 0
    while begin < len(text):
        end = begin + 1
        while end < len(text) and (unicodedata.combining(text[end]) or "\u1160" <= text[end] <= "\u11ff"):
            end += 1
        part = unicodedata.normalize("NFKC", text[begin:end])
        parts.append(part)
        places += [begin, *[None] * (len(part) - 1)] if part else []
        begin = end
    return "".join(parts), [*places, len(text)]
