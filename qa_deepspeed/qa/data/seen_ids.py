"""A set of ids that stays small at millions of them."""

from __future__ import annotations

from array import array


class SeenIds:
    """Remembers ids as 64-bit hashes in one open-addressing table: at most 32 bytes an id; a set of str takes 150.

    Two different ids with one hash would be taken for a duplicate: by the birthday bound, a chance of
    n^2 / 2^65, which is 3e-8 for a million ids.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 << 10))
        self._count = 0

    def add(self, example_id: str) -> bool:
        """Remember an id; False if it was there already."""
        # 0 marks an empty slot, so a hash is never 0.
        code = (hash(example_id) & 0xFFFFFFFFFFFFFFFF) or 1
        slots = self._slots
        slot = _slot_of(slots, code)
        if slots[slot]:
            return False
        slots[slot] = code
        self._count += 1
        if 2 * self._count > len(slots):
            self._double()
        return True

    def _double(self) -> None:
        larger = array("Q", bytes(16 * len(self._slots)))
        for code in self._slots:
            if code:
                larger[_slot_of(larger, code)] = code
        self._slots = larger


def _slot_of(slots: array[int], code: int) -> int:
    """The slot that holds a hash, or the empty one where it belongs."""
    mask = len(slots) - 1
    slot = code & mask
    while (found := slots[slot]) and found != code:
        slot = (slot + 1) & mask
    return slot
