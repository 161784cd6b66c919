"""Damage to small files, as disks, kills and editors do it, for tests of whatever reads them."""

from hypothesis import strategies as st


def flip(content: bytes, position: int, masks: list[int]) -> bytes:
    """The content with a burst of flipped bits: `masks` from `position`, taken modulo the length."""
    changed = bytearray(content)
    for offset, mask in enumerate(masks):
        changed[(position + offset) % len(changed)] ^= mask
    return bytes(changed)


PLACES = st.integers(0, 10**6)
OTHERS = st.sampled_from([b"", b"[]", b"5", b"null", b"{}", b'"text"', b"true", b"[[" * 5000, b"\xff\xfe", b"{}{}"])
DAMAGE = st.one_of(
    st.tuples(PLACES, st.lists(st.integers(1, 255), min_size=1, max_size=3)).map(
        lambda burst: lambda content: flip(content, *burst)
    ),
    PLACES.map(lambda length: lambda content: content[: length % len(content)]),
    OTHERS.map(lambda other: lambda content: other),
)
"""Functions from the content of a file to what is there instead: bits flipped, cut off, or another value."""
