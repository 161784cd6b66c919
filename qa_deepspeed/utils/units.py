"""Units of memory, and counts in words."""

GIB = 1 << 30


def plural(count: int, noun: str) -> str:
    """A count with its noun, such as "1 host" or "2,000 hosts"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def gib(size: int) -> str:
    """Bytes as a number of GiB, such as "0.25" or "31.4"."""
    return f"{size / GIB:.2f}" if size < 9.995 * GIB else f"{size / GIB:.1f}"
