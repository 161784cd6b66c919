"""How a tokenizer joins a question and a context, found by asking it, and texts turned into arrays of tokens.

A fast tokenizer encodes the two texts of a pair independently and puts fixed special tokens before, between and after
them. So each text is encoded once, and rows are assembled from arrays. That this equals the tokenizer's own output is
verified on probe texts before anything is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qa_deepspeed.qa.features.encoding import Encoder, Tokens, truncation_kept
from qa_deepspeed.qa.features.families import Family
from qa_deepspeed.qa.features.windows import cut_windows
from qa_deepspeed.utils.errors import UserError

PROBES = (
    ("Who wrote it, and when?", "It was written in 1874 by a lady of Weimar. Nobody knew her then; many did later on."),
    ("what?", "Über naïve Öfen: 北京 is far, 😀 is near. One more sentence, so that several windows are cut of it."),
    ("A b c 1 2", " Begins with a blank.\n\tAnd has\u00a0others  inside ... e\u0301 <un k> [MA] </ s> " + "x y z " * 9),
)


@dataclass(frozen=True)
class Special:
    """Special tokens that stand together: their ids and type ids."""

    ids: tuple[int, ...]
    types: tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """What stands around the two texts of a row: before, first text, between, second text, after.

    null_from_start and null_offset place the null position: so many tokens from the first, or back from the last.
    """

    before: Special
    between: Special
    after: Special
    question_type: int
    context_type: int
    context_first: bool
    null_from_start: bool
    null_offset: int

    @property
    def special_tokens(self) -> int:
        """Special tokens of a row."""
        return len(self.before.ids) + len(self.between.ids) + len(self.after.ids)


def find_template(tokenizer: Any, family: Family, encoder: Encoder) -> Template:
    """Ask the tokenizer what it puts around a question and a context.

    Raises: UserError if its rows are not two texts with fixed tokens around them.
    """
    first, second = (PROBES[0][1], PROBES[0][0]) if family.context_first else PROBES[0]
    with truncation_kept(tokenizer):
        row = tokenizer(first, second, return_token_type_ids=True)
    ids, types = list(row["input_ids"]), list(row["token_type_ids"])
    if tokenizer.is_fast:
        sequence = row.sequence_ids(0)
        places = [[position for position, text in enumerate(sequence) if text == which] for which in (0, 1)]
    else:
        places = _places(ids, [encoder.encode([text], offsets=False).ids.tolist() for text in (first, second)])
    if not all(places) or any(place[-1] - place[0] + 1 != len(place) for place in places) or places[0] > places[1]:
        raise _unsupported(tokenizer, "does not put the first text before the second one")
    cuts = [0, places[0][0], places[0][-1] + 1, places[1][0], places[1][-1] + 1, len(ids)]
    before, between, after = (
        Special(tuple(ids[a:b]), tuple(types[a:b])) for a, b in zip(cuts[::2], cuts[1::2], strict=True)
    )
    text_types = [set(types[place[0] : place[-1] + 1]) for place in places]
    if any(len(values) != 1 for values in text_types):
        raise _unsupported(tokenizer, "gives tokens of one text different type ids")
    (first_type,), (second_type,) = text_types
    from_start, offset = _null_place(tokenizer.cls_token_id if family.null_rule == "cls" else None, before, after)
    return Template(
        before,
        between,
        after,
        question_type=second_type if family.context_first else first_type,
        context_type=first_type if family.context_first else second_type,
        context_first=family.context_first,
        null_from_start=from_start,
        null_offset=offset,
    )


def _places(row: list[int], texts: list[list[int]]) -> list[list[int]]:
    """Where the tokens of each text stand in the row, one text after the other; empty where they do not."""
    found: list[list[int]] = []
    begin = 0
    for text in texts:
        starts = (at for at in range(begin, len(row) - len(text) + 1) if row[at : at + len(text)] == text)
        at = next(starts, None)
        found.append([] if at is None else list(range(at, at + len(text))))
        begin = 0 if at is None else at + len(text)
    return found


def _null_place(cls: int | None, before: Special, after: Special) -> tuple[bool, int]:
    """Where the null position is: the CLS token where there is one, else the last real token."""
    if cls is not None and cls in before.ids:
        return True, before.ids.index(cls)
    if cls is not None and cls in after.ids:
        return False, len(after.ids) - 1 - after.ids.index(cls)
    return False, 0


def check_template(tokenizer: Any, template: Template, encoder: Encoder) -> None:
    """Raises UserError unless rows assembled from the parts equal what the tokenizer gives for the probe texts.

    Whole pairs and pairs cut to a third of the context are compared. Rows after the first are not: tokenizers 0.23.2
    loses some of them, and in 0.23.3 they may lack the template's type ids or have untrimmed offsets.
    """
    for question, context in PROBES:
        parts = [encoder.encode([text], offsets=True) for text in (question, context)]
        whole = len(parts[1].ids)
        with truncation_kept(tokenizer):
            for room in (whole, max(2, whole // 3)):
                _check_row(tokenizer, template, question, context, parts, room)


def _check_row(tokenizer: Any, template: Template, question: str, context: str, parts: list[Tokens], room: int) -> None:
    first, second = (context, question) if template.context_first else (question, context)
    row = tokenizer(
        [first],
        [second],
        return_token_type_ids=True,
        return_offsets_mapping=tokenizer.is_fast,
        truncation="only_first" if template.context_first else "only_second",
        max_length=len(parts[0].ids) + template.special_tokens + room,
    )
    ids, types, at, places = next(_assemble(template, parts[0], parts[1], room, room))
    if row["input_ids"][0] != ids:
        raise _unsupported(tokenizer, "encodes a pair differently from its two texts with special tokens around")
    if row["token_type_ids"][0] != types:
        raise _unsupported(tokenizer, "gives type ids that depend on more than the text a token is of")
    if tokenizer.is_fast:
        theirs = [tuple(pair) for pair in row["offset_mapping"][0][at : at + len(places)]]
        if theirs[1:] != places[1:] or not _same_but_blanks(context, theirs[0], places[0]):
            raise _unsupported(tokenizer, "gives offsets of a pair that are not those of its texts alone")


def _same_but_blanks(text: str, one: tuple[int, int], other: tuple[int, int]) -> bool:
    return all(not text[min(edge) : max(edge)].strip() for edge in zip(one, other, strict=True))


def _assemble(template: Template, question: Tokens, context: Tokens, room: int, step: int) -> Iterator[tuple[Any, ...]]:
    """The rows of one question: ids, type ids, position of the first context token, offsets of the context tokens."""
    _, begins, counts = cut_windows(np.array([len(context.ids)]), np.array([room]), np.array([step]))
    for begin, count in zip(begins.tolist(), counts.tolist(), strict=True):
        window = slice(begin, begin + count)
        texts = [(question.ids.tolist(), template.question_type), (context.ids[window].tolist(), template.context_type)]
        if template.context_first:
            texts.reverse()
        specials = (template.before, template.between, template.after)
        ids: list[int] = []
        types: list[int] = []
        for place, special in enumerate(specials):
            ids += special.ids
            types += special.types
            if place < 2:
                ids += texts[place][0]
                types += [texts[place][1]] * len(texts[place][0])
        at = len(template.before.ids)
        if not template.context_first:
            at += len(question.ids) + len(template.between.ids)
        yield ids, types, at, list(zip(context.begin[window].tolist(), context.end[window].tolist(), strict=True))


def _unsupported(tokenizer: Any, reason: str) -> UserError:
    return UserError(f"the tokenizer {type(tokenizer).__name__} {reason}, so its features cannot be built")
