"""An answer is repaired to its true place or not at all."""

import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qa_deepspeed.qa.data.answers import REPAIR_DISTANCE, locate
from qa_deepspeed.qa.data.read_report import Fault, Reason

# Few letters, so that repetitions are common; blanks, a digit, a cased and an uncased script, a combining mark.
TEXTS = st.text(alphabet="ab1 \n\u3000é東\u0301😀.", max_size=60)


def places_of(context, text):
    return [place for place in range(len(context)) if context[place : place + len(text)] == text]


@given(context=TEXTS, text=TEXTS, start=st.integers(-5, 80))
def test_a_located_answer_is_a_slice_of_the_context_near_where_it_was_said_to_be(context, text, start):
    try:
        found, place = locate(context, text, start)
    except Fault:
        return
    assert context[place : place + len(found)] == found
    if text.strip() not in context:  # found in another Unicode form
        assert unicodedata.normalize("NFKC", found) == unicodedata.normalize("NFKC", text.strip()) != ""
        return
    assert found.strip() == text.strip() != ""
    if start < 0:  # unknown
        assert places_of(context, found) == [place]
        return
    leading = len(text) - len(text.lstrip())
    assert start - REPAIR_DISTANCE <= place <= start + leading + REPAIR_DISTANCE


@given(
    before=TEXTS,
    answer=TEXTS,
    after=TEXTS,
    shift=st.integers(-REPAIR_DISTANCE, REPAIR_DISTANCE),
    left=st.text(" \n", max_size=3),
    right=st.text(" \n", max_size=3),
)
def test_an_answer_shifted_within_the_distance_is_never_repaired_to_a_wrong_place(
    before, answer, after, shift, left, right
):
    answer = answer.strip()
    start = len(before) + shift
    assume(answer and start >= 0)
    context = before + answer + after
    try:
        found, place = locate(context, left + answer + right, start)
    except Fault as fault:
        assert fault.reason in (Reason.AMBIGUOUS, Reason.NOT_AT_START, Reason.START_PAST_END)
        return
    # Only where the file's own answer_start already fits is another place than the true one taken.
    stands_as_said = any(context.startswith(answer, start + blanks) for blanks in (0, len(left)))
    assert place + len(found) - len(found.lstrip()) == len(before) or stands_as_said


@given(before=TEXTS, answer=TEXTS, after=TEXTS, shift=st.integers(-REPAIR_DISTANCE, REPAIR_DISTANCE))
def test_an_answer_that_stands_once_as_words_of_its_own_is_always_repaired(before, answer, after, shift):
    answer = answer.strip()
    context = f"{before}.{answer}.{after}"
    start = len(before) + 1 + shift
    assume(answer and start >= 0 and len(places_of(context, answer)) == 1)
    assert locate(context, answer, start) == (answer, len(before) + 1)


@pytest.mark.parametrize(
    ("context", "text", "start", "reason"),
    [
        ("king in", "in", 0, Reason.AMBIGUOUS),
        ("the king", "in", 3, Reason.NOT_AT_START),
        ("born 1867s", "1867", 4, Reason.NOT_AT_START),
        ("aaa.", "a", 3, Reason.AMBIGUOUS),
        ("a" + " " * REPAIR_DISTANCE + "b", "a", REPAIR_DISTANCE + 1, Reason.NOT_AT_START),
        ("a b a", "a", -1, Reason.START_UNKNOWN),
        ("ab", "a", -1, Reason.START_UNKNOWN),
        ("a b", "b", 30, Reason.START_PAST_END),
        ("a b", "c", 0, Reason.TEXT_ABSENT),
        ("a b", "\u3000", 0, Reason.EMPTY_ANSWER),
        ("a b", "b", 10**30, Reason.START_PAST_END),
    ],
)
def test_what_is_not_repaired(context, text, start, reason):
    with pytest.raises(Fault) as caught:
        locate(context, text, start)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("context", "text", "start", "located"),
    [
        ("奈良にある東大寺", "東大", 3, ("東大", 5)),
        ("xx\u00a0Paris", " Paris", 2, ("Paris", 3)),
        ("the the", "the ", 4, ("the", 4)),
        (" Paris ", " Paris ", 0, (" Paris ", 0)),
        ("a" + " " * 9 + "b", "a", 10, ("a", 0)),
        ("U.S. and U.K.", "U.K.", 12, ("U.K.", 9)),
    ],
)
def test_what_is_repaired_or_right(context, text, start, located):
    assert locate(context, text, start) == located
