"""Units of memory, and counts in words."""

GIB = 1 << 30


def plural(count: int, noun: str) -> str:
    """A count with its noun, such as "1 host" or "2,000 hosts"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
