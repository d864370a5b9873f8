"""Words for messages: many names in one line, a number with its noun, what an error says."""

from __future__ import annotations

from collections.abc import Sequence


def shorten(names: Sequence[str], limit: int = 5) -> str:
    """The first `limit` names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def counted(number: int, noun: str) -> str:
    """`1 epoch`, `2 epochs`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def in_one_line(error: BaseException) -> str:
    """All that an error says, in a line; of one without text its type."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """What an error says, in a line; of one without text, as MemoryError often is, its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
